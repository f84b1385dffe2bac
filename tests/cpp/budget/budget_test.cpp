// The ledger: exact at every instant, whatever threads do.
#include "budget/budget.hpp"

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();

std::size_t sum_of_tags(const BudgetStats& stats) {
  std::size_t sum = 0;
  for (const std::size_t used : stats.used_by_tag) sum += used;
  return sum;
}

TEST(Budget, ChargesUpToTheCapAndNotAByteMore) {
  Budget budget(100);
  EXPECT_TRUE(budget.try_charge(Tag::kWeights, 60));
  EXPECT_TRUE(budget.try_charge(Tag::kActivations, 40));
  EXPECT_FALSE(budget.try_charge(Tag::kCache, 1));
  EXPECT_TRUE(budget.try_charge(Tag::kCache, 0));
  EXPECT_EQ(budget.available(), 0U);
  budget.release(Tag::kWeights, 1);
  EXPECT_TRUE(budget.try_charge(Tag::kCache, 1));
  EXPECT_EQ(sum_of_tags(budget.stats()), 100U);
  EXPECT_EQ(budget.stats().refused, 1U);
}

TEST(Budget, SizesNearTheLargestNumberDoNotWrapAround) {
  Budget budget(100);
  ASSERT_TRUE(budget.try_charge(Tag::kWeights, 10));
  EXPECT_FALSE(budget.try_charge(Tag::kWeights, kMost));
  EXPECT_FALSE(budget.try_charge(Tag::kWeights, kMost - 9));
  EXPECT_THROW(budget.charge(Tag::kWeights, kMost - 5), CapExceededError);
  EXPECT_EQ(budget.stats().used, 10U);
  Budget unlimited(kMost);
  EXPECT_TRUE(unlimited.try_charge(Tag::kWeights, kMost));
  EXPECT_FALSE(unlimited.try_charge(Tag::kWeights, 1));
}

TEST(Budget, RefusalCarriesTheLedger) {
  Budget budget(2048);
  budget.charge(Tag::kWeights, 1024);
  budget.charge(Tag::kOutside, 100);
  try {
    budget.charge(Tag::kActivations, 1000);
    FAIL() << "1000 bytes fitted";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.requested, 1000U);
    EXPECT_EQ(error.cap, 2048U);
    EXPECT_EQ(error.used, 1124U);
    const std::string text = error.what();
    for (const char* part : {"1000 bytes", "2.00 KiB", "weights 1.00 KiB", "outside 100 bytes"}) {
      EXPECT_NE(text.find(part), std::string::npos) << text;
    }
    EXPECT_EQ(text.find("cache"), std::string::npos) << text;
  }
  EXPECT_EQ(budget.stats().used, 1124U);
  EXPECT_EQ(budget.stats().refused, 1U);
}

TEST(Budget, ReleasingMoreThanATagHoldsChangesNothing) {
  Budget budget(100);
  budget.charge(Tag::kWeights, 10);
  budget.charge(Tag::kCache, 50);
  EXPECT_THROW(budget.release(Tag::kWeights, 11), std::logic_error);
  EXPECT_THROW(budget.release(Tag::kOutside, 1), std::logic_error);
  EXPECT_EQ(budget.stats().used, 60U);
  budget.release(Tag::kWeights, 10);
  EXPECT_EQ(budget.stats().used, 50U);
}

TEST(Budget, PeaksAreThoseSinceTheReset) {
  Budget budget(100);
  budget.charge(Tag::kWeights, 70);
  budget.charge(Tag::kCache, 20);
  budget.release(Tag::kWeights, 70);
  EXPECT_EQ(budget.stats().peak, 90U);
  EXPECT_EQ(budget.stats().peak_by_tag[0], 70U);
  budget.reset_peaks();
  EXPECT_EQ(budget.stats().peak, 20U);
  EXPECT_EQ(budget.stats().peak_by_tag[0], 0U);
  budget.charge(Tag::kWeights, 5);
  EXPECT_EQ(budget.stats().peak, 25U);
  EXPECT_EQ(budget.stats().peak_by_tag[0], 5U);
}

TEST(Budget, CapChangesOnlyWhereWhatIsUsedFits) {
  Budget budget(100);
  budget.charge(Tag::kWeights, 60);
  EXPECT_FALSE(budget.try_set_cap(59));
  EXPECT_EQ(budget.cap(), 100U);
  EXPECT_TRUE(budget.try_set_cap(60));
  EXPECT_EQ(budget.available(), 0U);
  EXPECT_FALSE(budget.try_charge(Tag::kWeights, 1));
  EXPECT_TRUE(budget.try_set_cap(61));
  EXPECT_TRUE(budget.try_charge(Tag::kWeights, 1));
}

TEST(Budget, EveryTagHasItsName) {
  EXPECT_STREQ(tag_name(Tag::kWeights), "weights");
  EXPECT_STREQ(tag_name(Tag::kActivations), "activations");
  EXPECT_STREQ(tag_name(Tag::kWorkspace), "workspace");
  EXPECT_STREQ(tag_name(Tag::kCache), "cache");
  EXPECT_STREQ(tag_name(Tag::kOutside), "outside");
}

// ---- waiting -----------------------------------------------------------------------------------

TEST(Budget, WaiterGivesUpAfterItsLimit) {
  Budget budget(10);
  budget.charge(Tag::kWeights, 8);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_FALSE(budget.charge_within(Tag::kCache, 3, milliseconds(30)));
  EXPECT_GE(std::chrono::steady_clock::now() - start, milliseconds(30));
  EXPECT_FALSE(budget.charge_within(Tag::kCache, 3, milliseconds(0)));
  EXPECT_FALSE(budget.charge_within(Tag::kCache, 3, milliseconds(-1)));
  EXPECT_EQ(budget.stats().used, 8U);
  EXPECT_EQ(budget.stats().refused, 3U);
  EXPECT_TRUE(budget.charge_within(Tag::kCache, 2, milliseconds(0)));
}

TEST(Budget, WaiterGetsItsBytesWhenTheyAreReleased) {
  Budget budget(10);
  budget.charge(Tag::kWeights, 10);
  bool charged = false;
  Running waiter([&] { charged = budget.charge_within(Tag::kCache, 4, milliseconds::max()); });
  budget.release(Tag::kWeights, 3);  // not enough
  budget.release(Tag::kWeights, 1);
  waiter.join();
  EXPECT_TRUE(charged);
  EXPECT_EQ(budget.stats().used, 10U);
}

TEST(Budget, WaiterWithoutATimeLimitGetsItsBytesWhenTheyAreReleased) {
  Budget budget(10);
  budget.charge(Tag::kWeights, 10);
  bool charged = false;
  Running waiter([&] { charged = budget.charge_within(Tag::kCache, 4, milliseconds::max()); });
  // Were the limit taken for one in the past, it would end within this time.
  EXPECT_FALSE(eventually([&] { return waiter.ended(); }, milliseconds(50)));
  budget.release(Tag::kWeights, 4);
  waiter.join();
  EXPECT_TRUE(charged);
}

TEST(Budget, WaiterGetsItsBytesWhenTheCapGrows) {
  Budget budget(10);
  budget.charge(Tag::kWeights, 10);
  bool charged = false;
  Running waiter([&] { charged = budget.charge_within(Tag::kCache, 4, milliseconds::max()); });
  EXPECT_FALSE(eventually([&] { return waiter.ended(); }, milliseconds(50)));  // so it does wait
  EXPECT_TRUE(budget.try_set_cap(14));
  waiter.join();
  EXPECT_TRUE(charged);
}

TEST(Budget, OneReleaseWakesAllThatFit) {
  Budget budget(10);
  budget.charge(Tag::kWeights, 10);
  std::vector<std::unique_ptr<Running>> waiters;
  std::atomic<int> charged{0};
  for (int i = 0; i < 5; ++i) {
    waiters.push_back(std::make_unique<Running>(
        [&] { charged += budget.charge_within(Tag::kCache, 2, kLongest) ? 1 : 0; }));
  }
  budget.release(Tag::kWeights, 10);
  for (const auto& waiter : waiters) waiter->join();
  EXPECT_EQ(charged, 5);
}

// ---- scoped charges ----------------------------------------------------------------------------

TEST(ScopedCharge, GivesBackUnlessKept) {
  Budget budget(100);
  budget.charge(Tag::kWeights, 30);
  {
    const ScopedCharge charge(budget, Tag::kWeights, 30);
    EXPECT_EQ(budget.stats().used, 30U);
  }
  EXPECT_EQ(budget.stats().used, 0U);
  budget.charge(Tag::kWeights, 30);
  {
    ScopedCharge charge(budget, Tag::kWeights, 30);
    charge.keep();
  }
  EXPECT_EQ(budget.stats().used, 30U);
}

// ---- many threads ------------------------------------------------------------------------------

TEST(Budget, IsExactAtEveryInstantUnderEightThreads) {
  constexpr std::size_t kCap = 1000;
  Budget budget(kCap);
  std::atomic<bool> stop{false};
  std::size_t violations = 0;
  Running checker([&] {
    while (!stop) {
      const BudgetStats stats = budget.stats();
      const bool exact = sum_of_tags(stats) == stats.used && stats.used <= stats.cap &&
                         stats.peak <= kCap && stats.peak >= stats.used;
      if (!exact) ++violations;
    }
  });
  std::vector<std::unique_ptr<Running>> threads;
  for (unsigned seed = 0; seed < 8; ++seed) {
    threads.push_back(std::make_unique<Running>([&, seed] {
      std::mt19937 random(seed);
      std::array<std::size_t, kTagCount> mine{};
      for (int i = 0; i < 4000; ++i) {
        const std::size_t tag = random() % kTagCount;
        const std::size_t nbytes = random() % 300;
        const auto name = static_cast<Tag>(tag);
        bool charged = false;
        switch (random() % 4) {
          case 0:
            charged = budget.try_charge(name, nbytes);
            break;
          case 1:
            charged = budget.charge_within(name, nbytes, milliseconds(1));
            break;
          case 2:
            try {
              budget.charge(name, nbytes);
              charged = true;
            } catch (const CapExceededError& error) {
              EXPECT_GT(error.requested, error.cap - error.used);
            }
            break;
          default:
            budget.release(name, mine[tag]);
            mine[tag] = 0;
        }
        if (charged) mine[tag] += nbytes;
      }
      for (std::size_t tag = 0; tag < kTagCount; ++tag) {
        budget.release(static_cast<Tag>(tag), mine[tag]);
      }
    }));
  }
  for (const auto& thread : threads) thread->join();
  stop = true;
  checker.join();
  EXPECT_EQ(violations, 0U);
  EXPECT_EQ(budget.stats().used, 0U);
  EXPECT_GT(budget.stats().peak, kCap / 2);  // they did compete
}

}  // namespace
}  // namespace penstock
