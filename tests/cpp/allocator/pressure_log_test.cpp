// Whoever listens is told where memory is short, in order, and nobody who allocates waits for it.
#include "allocator/pressure_log.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "support/allocator_setup.hpp"
#include "support/child.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

class Giver : public RoomSource {
 public:
  Giver(Budget& budget, std::size_t nbytes) : budget_(budget), held_(nbytes) {
    budget_.charge(Tag::kWeights, nbytes);
  }
  std::size_t give_back(std::size_t nbytes) override {
    const std::size_t given = std::min(nbytes, held_);
    budget_.release(Tag::kWeights, given);
    held_ -= given;
    return given;
  }

 private:
  Budget& budget_;
  std::size_t held_;
};

TEST(PressureLog, TellsOfTheCapDrawingNearOfRoomAndOfRefusals) {
  const AllocatorSetup setup(20);
  PressureLog& log = setup.allocator->pressure();
  const auto giver = std::make_shared<Giver>(*setup.budget, 4 * kFrame);
  setup.pool->add_source(giver, RoomRank::kResidentSet);
  log.set_listening(true);
  void* first = setup.take(14 * kFrame);
  EXPECT_TRUE(log.take(milliseconds(0)).empty());
  void* second = setup.take(kFrame + 1);
  EXPECT_THROW(setup.take(9 * kFrame), CapExceededError);
  const auto events = log.take(milliseconds(0));
  ASSERT_EQ(events.size(), 3U);
  EXPECT_EQ(events[0].kind, PressureKind::kNear);
  EXPECT_EQ(events[0].asked, kFrame + 1);
  EXPECT_EQ(events[0].used, 20 * kFrame);
  EXPECT_EQ(events[0].cap, 20 * kFrame);
  EXPECT_EQ(events[1].kind, PressureKind::kMadeRoom);
  EXPECT_EQ(events[1].given, 4 * kFrame);
  EXPECT_EQ(events[1].available, 4 * kFrame);
  EXPECT_EQ(events[2].kind, PressureKind::kRefused);
  EXPECT_EQ(events[2].asked, 9 * kFrame);
  EXPECT_EQ(log.given_bytes(), 4 * kFrame);
  // Near again only after it was not.
  void* third = setup.take(4 * kFrame);
  EXPECT_TRUE(log.take(milliseconds(0)).empty());
  for (void* block : {first, second, third}) setup.allocator->free(block);
  setup.allocator->empty_cache();
  setup.allocator->free(setup.take(kFrame));
  setup.allocator->free(setup.take(20 * kFrame));
  EXPECT_EQ(log.take(milliseconds(0)).size(), 1U);
}

TEST(PressureLog, NobodyIsToldWhoDoesNotListen) {
  const AllocatorSetup setup(2);
  EXPECT_THROW(setup.take(3 * kFrame), CapExceededError);
  PressureLog& log = setup.allocator->pressure();
  log.set_listening(true);
  EXPECT_TRUE(log.take(milliseconds(0)).empty());
  EXPECT_EQ(log.dropped(), 0U);
}

TEST(PressureLog, WhatFindsNoRoomIsDroppedAndCounted) {
  PressureLog log;
  log.set_listening(true);
  for (std::size_t i = 0; i < PressureLog::kCapacity + 10; ++i) log.note_refusal(i, {});
  EXPECT_EQ(log.dropped(), 10U);
  const auto events = log.take(milliseconds(0));
  ASSERT_EQ(events.size(), PressureLog::kCapacity);
  for (std::size_t i = 0; i < events.size(); ++i) EXPECT_EQ(events[i].asked, i);
}

TEST(PressureLog, WakesWhoWaits) {
  PressureLog log;
  log.set_listening(true);
  Running waiting([&] { EXPECT_TRUE(log.take(kLongest).empty()); });
  std::this_thread::sleep_for(milliseconds(5));
  log.wake();
  waiting.join();
}

TEST(PressureLog, ForkedChildLeavesWhileSomebodyWaits) {
  auto log = std::make_unique<PressureLog>();
  log->set_listening(true);
  Running waiting([&] { EXPECT_TRUE(log->take(kLongest).empty()); });
  std::this_thread::sleep_for(milliseconds(20));
  const ChildEnd child = run_in_child([&] {
    log.reset();
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
  log->wake();
  waiting.join();
}

TEST(PressureLog, EventsOfManyThreadsArriveOrAreCounted) {
  PressureLog log;
  log.set_listening(true);
  constexpr std::size_t kEach = 2000;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (std::size_t n = 0; n < kEach; ++n) log.note_refusal(n, {});
    });
  }
  std::size_t taken = 0;
  while (taken + log.dropped() < 3 * kEach) taken += log.take(milliseconds(1)).size();
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(taken + log.dropped(), 3 * kEach);
}

}  // namespace
}  // namespace penstock
