// The thread under the watch of outside memory: it runs from time to time and on request, ends when
// it is told to, and leaves a forked child alone.
#include "threading/periodic_thread.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "error/error.hpp"
#include "support/child.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::hours;
using std::chrono::milliseconds;

TEST(PeriodicThread, RunsFromTimeToTime) {
  std::atomic<int> runs{0};
  const PeriodicThread thread([&] { ++runs; }, milliseconds(1));
  EXPECT_TRUE(eventually([&] { return runs >= 3; }));
}

TEST(PeriodicThread, RunsAtOnceWhenAskedAndSeesWhatWasDoneBefore) {
  std::atomic<int> value{0};
  std::atomic<int> seen{-1};
  PeriodicThread thread([&] { seen = value.load(); }, hours(24 * 10000));
  for (int i = 1; i <= 100; ++i) {
    value = i;
    ASSERT_TRUE(thread.run_now(kLongest));
    ASSERT_EQ(seen, i);
  }
}

TEST(PeriodicThread, ARunThatIsUnderWayDoesNotCount) {
  Gate gate;
  Gate started;
  std::atomic<int> runs{0};
  PeriodicThread thread(
      [&] {
        started.open();
        gate.wait();
        ++runs;
      },
      hours(1));
  EXPECT_FALSE(thread.run_now(milliseconds(20)));
  started.wait();
  Running asking([&] {
    EXPECT_TRUE(thread.run_now(kLongest));
    EXPECT_EQ(runs, 2);
  });
  std::this_thread::sleep_for(milliseconds(5));
  gate.open();
  asking.join();
}

TEST(PeriodicThread, EndsWithoutWaitingForItsInterval) {
  const auto start = std::chrono::steady_clock::now();
  {
    const PeriodicThread thread([] {}, hours(1));
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, kLongest);
}

TEST(PeriodicThread, ForkedChildIsToldAndLeavesCleanly) {
  auto thread = std::make_unique<PeriodicThread>([] {}, milliseconds(1));
  // A fork while a thread starts would take a sanitizer's lock along.
  ASSERT_TRUE(thread->run_now(kLongest));
  const ChildEnd child = run_in_child([&] {
    if (thread->in_owner_process()) return 1;
    try {
      thread->run_now(milliseconds(1));
      return 2;
    } catch (const Error& error) {
      if (std::string(error.what()).find("after the fork") == std::string::npos) return 3;
    }
    thread.reset();
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
  EXPECT_TRUE(thread->run_now(kLongest));
}

}  // namespace
}  // namespace penstock
