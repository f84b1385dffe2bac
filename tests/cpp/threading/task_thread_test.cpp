// The thread under streams and pager: order, what becomes of queued tasks, and forks.
#include "threading/task_thread.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/child.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using AtEnd = TaskThread::AtEnd;
using Order = TaskThread::Order;

TEST(TaskThread, RunsTasksInOrderAndUrgentOnesFirst) {
  std::vector<int> ran;
  Gate gate;
  Gate started;
  {
    TaskThread thread(AtEnd::kFinish);
    thread.submit([&] {
      started.open();
      gate.wait();
    });
    started.wait();  // so that the rest is queued behind it
    for (const int i : {1, 2, 3}) thread.submit([&ran, i] { ran.push_back(i); });
    thread.submit([&ran] { ran.push_back(0); }, Order::kFront);
    gate.open();
  }
  EXPECT_EQ(ran, (std::vector<int>{0, 1, 2, 3}));
}

TEST(TaskThread, SubmitDoesNotWait) {
  Gate gate;
  TaskThread thread(AtEnd::kFinish);
  for (int i = 0; i < 10; ++i) thread.submit([&] { gate.wait(); });
  gate.open();
}

TEST(TaskThread, DropsWhatIsQueuedAndFinishesWhatRuns) {
  bool first_finished = false;
  bool second_ran = false;
  const auto resource = std::make_shared<int>(1);
  {
    Gate started;
    TaskThread thread(AtEnd::kDrop);
    thread.submit([&] {
      started.open();
      std::this_thread::sleep_for(std::chrono::milliseconds(20));  // be at it when the end comes
      first_finished = true;
    });
    thread.submit([&, resource] { second_ran = true; });
    started.wait();
  }
  EXPECT_TRUE(first_finished);
  EXPECT_FALSE(second_ran);
  EXPECT_EQ(resource.use_count(), 1);  // a dropped task is destroyed, not leaked
}

TEST(TaskThread, TaskGoesAsSoonAsItHasRun) {
  auto resource = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = resource;
  TaskThread thread(AtEnd::kFinish);
  thread.submit([resource] {});
  resource.reset();
  EXPECT_TRUE(eventually([&] { return watch.expired(); }));
}

TEST(TaskThread, TaskMaySubmitTasks) {
  std::atomic<int> ran{0};
  TaskThread thread(AtEnd::kFinish);
  thread.submit([&] {
    thread.submit([&] { ++ran; });
    thread.submit([&] { ++ran; }, Order::kFront);
  });
  EXPECT_TRUE(eventually([&] { return ran == 2; }));
}

TEST(TaskThread, ForkedChildIsToldAndLeavesCleanly) {
  Gate gate;
  Gate started;
  auto thread = std::make_unique<TaskThread>(AtEnd::kFinish);
  thread->submit([&] {
    started.open();
    gate.wait();
  });
  started.wait();  // the child's copy looks busy for ever
  const ChildEnd child = run_in_child([&] {
    if (thread->in_owner_process()) return 1;
    try {
      thread->submit([] {});
      return 2;
    } catch (const Error& error) {
      if (std::string(error.what()).find("after the fork") == std::string::npos) return 3;
    }
    thread.reset();  // neither joins nor touches a lock
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
  EXPECT_TRUE(thread->in_owner_process());
  gate.open();
}

}  // namespace
}  // namespace penstock
