// What the process holds beyond the ledger is charged to the cap: as it is at the start, as it
// grows, and no longer than it lasts, whatever happens to the ledger meanwhile.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "outside/outside_watch.hpp"
#include "support/allocator_setup.hpp"
#include "support/child.hpp"
#include "support/ledger_watch.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::hours;
using std::chrono::milliseconds;

BudgetStats ledger(std::size_t inside, std::size_t outside, std::uint64_t version) {
  BudgetStats stats;
  stats.used = inside + outside;
  stats.used_by_tag[0] = inside;
  stats.used_by_tag[static_cast<std::size_t>(Tag::kOutside)] = outside;
  stats.version = version;
  return stats;
}

TEST(OutsideEstimate, IsWhatTheDeviceHoldsBeyondTheLedger) {
  const BudgetStats still = ledger(100, 70, 3);
  EXPECT_EQ(OutsideEstimate::outside_of(still, 150, still), 50U);
  EXPECT_EQ(OutsideEstimate::outside_of(still, 90, still), 0U);
}

TEST(OutsideEstimate, ReadingsOfALedgerThatChangesDoNotCount) {
  const BudgetStats still = ledger(100, 0, 3);
  EXPECT_FALSE(OutsideEstimate::outside_of(still, 150, ledger(100, 0, 5)));
  BudgetStats moving = still;
  moving.in_transit = 1;
  EXPECT_FALSE(OutsideEstimate::outside_of(moving, 150, still));
  EXPECT_FALSE(OutsideEstimate::outside_of(still, 150, moving));
}

TEST(OutsideEstimate, WhileTheLedgerChangesALeastAmountIsKnown) {
  const BudgetStats before = ledger(100, 70, 3);
  BudgetStats after = ledger(90, 70, 5);  // 20 were charged, and 30 released
  after.charged = before.charged + 20;
  EXPECT_EQ(OutsideEstimate::at_least(before, 150, after), 30U);
  EXPECT_EQ(OutsideEstimate::at_least(before, 119, after), 0U);
  OutsideEstimate estimate;
  EXPECT_EQ(estimate.follow(20), 20U);
  EXPECT_EQ(estimate.follow_growth(30), 30U);
  for (std::size_t i = 0; i < 2 * OutsideEstimate::kReadings; ++i) {
    EXPECT_EQ(estimate.follow_growth(10), 30U);  // less at least says nothing
  }
}

TEST(OutsideEstimate, FollowsGrowthAtOnceAndShrinkageWhenItLasts) {
  OutsideEstimate estimate;
  EXPECT_EQ(estimate.follow(10), 10U);
  EXPECT_EQ(estimate.follow(30), 30U);
  for (std::size_t i = 1; i < OutsideEstimate::kReadings; ++i) EXPECT_EQ(estimate.follow(20), 30U);
  EXPECT_EQ(estimate.follow(20), 20U);
}

struct OutsideWatchTest : ::testing::Test {
  void start(std::size_t reserve = 0, milliseconds interval = hours(1)) {
    watch.emplace(setup.pool, OutsideOptions{reserve, interval});
  }
  void look() { ASSERT_TRUE(watch->look(kLongest)); }
  std::size_t charged() const {
    return setup.budget->stats().used_by_tag[static_cast<std::size_t>(Tag::kOutside)];
  }

  AllocatorSetup setup{10};
  std::optional<OutsideWatch> watch;
};

TEST_F(OutsideWatchTest, ChargesWhatIsThereAndTheReserve) {
  setup.device->set_outside(3 * kMiB, true);
  start(kMiB);
  EXPECT_EQ(charged(), 4 * kMiB);
  const OutsideStats stats = watch->stats();
  EXPECT_EQ(stats.held, 3 * kMiB);
  EXPECT_EQ(stats.charged, 4 * kMiB);
  EXPECT_EQ(stats.reserve, kMiB);
  EXPECT_TRUE(stats.whole_device);
  watch.reset();
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST_F(OutsideWatchTest, WhatTheLedgerKnowsIsNotCountedTwice) {
  void* block = setup.take(3 * kFrame);
  setup.device->set_outside(kMiB);
  start();
  EXPECT_EQ(charged(), kMiB);
  void* more = setup.take(2 * kFrame);
  look();
  EXPECT_EQ(charged(), kMiB);
  setup.allocator->free(block);
  setup.allocator->free(more);
  setup.allocator->empty_cache();
  look();
  EXPECT_EQ(charged(), kMiB);
}

TEST_F(OutsideWatchTest, FollowsWhatGrowsAndWhatShrinks) {
  setup.device->set_outside(kMiB);
  start(0, milliseconds(1));
  setup.device->set_outside(5 * kMiB);
  EXPECT_TRUE(eventually([&] { return charged() == 5 * kMiB; }));
  setup.device->set_outside(2 * kMiB);
  EXPECT_TRUE(eventually([&] { return charged() == 2 * kMiB; }));
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
}

TEST_F(OutsideWatchTest, GrowthHasOthersMakeRoom) {
  setup.device->set_outside(0);
  start();
  void* kept = setup.take(2 * kFrame);
  setup.allocator->free(setup.take(8 * kFrame));  // cached
  EXPECT_EQ(setup.budget->available(), 0U);
  setup.device->set_outside(5 * kFrame);
  look();
  EXPECT_EQ(charged(), 5 * kFrame);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
  EXPECT_TRUE(setup.allocator->find_block(kept));
}

TEST_F(OutsideWatchTest, WhereThereIsNoRoomAllIsChargedThatIsLeftAndItIsOnRecordOnce) {
  setup.device->set_outside(0);
  start(2 * kFrame);
  void* block = setup.take(7 * kFrame);
  setup.device->set_outside(kFrame);  // within the reserve, which cannot be put back whole
  look();
  EXPECT_EQ(charged(), 3 * kFrame);
  setup.device->set_outside(2 * kFrame);
  look();
  EXPECT_EQ(setup.device->suppressed_count(), 0U);  // the reserve is there for that
  setup.device->set_outside(4 * kFrame);
  for (int i = 0; i < 3; ++i) look();
  EXPECT_EQ(charged(), 3 * kFrame);
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
  EXPECT_NE(setup.device->last_suppressed().find("2.00 MiB (2097152 bytes) are beyond"),
            std::string::npos)
      << setup.device->last_suppressed();
  setup.allocator->free(block);  // now there is room
  look();
  EXPECT_EQ(charged(), 6 * kFrame);
}

TEST_F(OutsideWatchTest, ACapThatIsTooSmallIsRefusedWithTheNumbers) {
  setup.device->set_outside(20 * kMiB);
  try {
    start(kMiB);
    FAIL() << "it does not fit";
  } catch (const CapExceededError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("20.00 MiB"), std::string::npos) << text;
    EXPECT_NE(text.find("1.00 MiB"), std::string::npos) << text;
    EXPECT_EQ(error.requested, 21 * kMiB);
    EXPECT_EQ(error.cap, 10 * kFrame);
    EXPECT_EQ(error.used, 0U);
  }
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST_F(OutsideWatchTest, ADeviceThatCannotTellIsRefused) {
  EXPECT_THROW(start(), std::invalid_argument);
  setup.device->set_outside(0);
  setup.device->fail_nth_call_of("process_memory", 0);
  EXPECT_THROW(start(), DeviceError);
  EXPECT_THROW(start(0, milliseconds(0)), std::invalid_argument);
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST_F(OutsideWatchTest, ErrorsOfTheDeviceLeaveTheChargeAndAreOnRecord) {
  setup.device->set_outside(kMiB);
  start();
  for (int i = 0; i < 3; ++i) {
    setup.device->set_outside(std::nullopt);  // fails each time
    look();
  }
  EXPECT_EQ(charged(), kMiB);
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
  setup.device->set_outside(2 * kMiB);
  look();
  EXPECT_EQ(charged(), 2 * kMiB);
  setup.device->fail_nth_call_of("process_memory", 0);
  look();
  EXPECT_EQ(setup.device->suppressed_count(), 2U);
}

TEST_F(OutsideWatchTest, ReserveCanChange) {
  setup.device->set_outside(kMiB);
  start(kMiB);
  watch->set_reserve(4 * kMiB);
  look();
  EXPECT_EQ(charged(), 5 * kMiB);
  watch->set_reserve(0);
  look();
  EXPECT_EQ(charged(), kMiB);
}

TEST_F(OutsideWatchTest, StoppedItKeepsItsChargeAndLooksNoMore) {
  setup.device->set_outside(kMiB);
  start();
  watch->stop();
  setup.device->set_outside(2 * kMiB);
  EXPECT_FALSE(watch->look(kLongest));
  EXPECT_EQ(charged(), kMiB);
  watch->stop();
}

TEST_F(OutsideWatchTest, ForkedChildIsToldAndLeavesCleanly) {
  setup.device->set_outside(kMiB);
  start(0, milliseconds(1));
  const ChildEnd child = run_in_child([&] {
    try {
      watch->look(milliseconds(1));
      return 1;
    } catch (const Error&) {
    }
    watch->stop();
    watch.reset();
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
  look();
}

// Memory that comes and goes in the ledger, on several threads, and outside of it: at no instant is
// more charged than the cap, and in the end it is exactly what is there.
TEST_F(OutsideWatchTest, ThreadsThatTakeAndGiveFramesDoNotMisleadIt) {
  setup.device->set_outside(kMiB);
  setup.device->delay_calls_of("frame_create", std::chrono::microseconds(50));
  setup.device->delay_calls_of("frame_release", std::chrono::microseconds(50));
  start(0, milliseconds(1));
  {
    const LedgerWatch cap(*setup.budget);
    std::atomic<std::size_t> most{0};
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 3; ++seed) {
      threads.emplace_back([&, seed] {
        std::mt19937 random(seed);
        for (int i = 0; i < 300; ++i) {
          auto frame = setup.pool->try_take(Tag::kWeights);
          if (random() % 2 == 0) std::this_thread::yield();
          if (charged() > most) most = charged();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(most, kMiB) << "frames on their way were taken for memory outside";
  }
  for (std::size_t i = 0; i <= OutsideEstimate::kReadings; ++i) look();
  EXPECT_EQ(charged(), kMiB);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
}

}  // namespace
}  // namespace penstock
