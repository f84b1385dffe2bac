// The managed pager as one caller sees it: what is resident when, which pages go, who waits for
// whom, and what is left alone.
#include "managed/managed_pager.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/pager_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr std::size_t kLargePage = std::size_t{2} << 20;  // where the system counts residency

// ---- residency and the ledger ------------------------------------------------------------------

TEST(ManagedPager, ReservingTakesAddressesOnly) {
  PagerSetup setup(4);
  const auto region = setup.pager->reserve(3 * kPage + 1, Access::kReadMostly);
  EXPECT_EQ(region->page_count(), 4U);
  EXPECT_EQ(region->page_nbytes(3), 4096U);  // what a system makes resident at least
  EXPECT_EQ(region->nbytes(), 3 * kPage + 1);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(region->address()) % (std::size_t{2} << 20), 0U);
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.pager->region_stats(*region).resident_pages, 0U);
  EXPECT_EQ(setup.spy->held(), 0U);
}

TEST(ManagedPager, PagesOfAByteRange) {
  PagerSetup setup(4);
  const auto region = setup.pager->reserve(3 * kPage + 10, Access::kReadMostly);
  EXPECT_EQ(region->pages_of(0, 1), (Pages{0}));
  EXPECT_EQ(region->pages_of(kPage - 1, 2), (Pages{0, 1}));
  EXPECT_EQ(region->pages_of(kPage, kPage), (Pages{1}));
  EXPECT_EQ(region->pages_of(0, region->nbytes()), (Pages{0, 1, 2, 3}));
  EXPECT_EQ(region->pages_of(5, 0), Pages{});
  EXPECT_EQ(region->pages_of(region->nbytes(), 0), Pages{});
  EXPECT_THROW(region->pages_of(region->nbytes(), 1), std::out_of_range);
  EXPECT_THROW(region->pages_of(1, ~std::size_t{0}), std::out_of_range);
}

TEST(ManagedPager, LedgerSaysWhatTheSystemSays) {
  PagerSetup setup(3, kLargePage);
  const auto region = setup.reserve(6);
  const Bytes bytes = fill(*region, 1);
  const auto agree = [&] {
    setup.pager->synchronize();
    const auto resident = setup.device->managed_resident(region->address(), region->nbytes());
    return resident.value_or(0) == setup.budget->stats().used &&
           setup.pager->region_stats(*region).resident_bytes == setup.budget->stats().used;
  };
  setup.pager->begin(*region, {0, 1}, kCaller);
  EXPECT_EQ(setup.used_pages(), 2U);
  EXPECT_TRUE(agree());
  setup.pager->end(*region, {0, 1}, kCaller);
  EXPECT_TRUE(agree());  // they stay until someone needs the room
  run_step(*setup.pager, *region, {4, 5});
  EXPECT_EQ(setup.used_pages(), 3U);
  EXPECT_TRUE(agree());
  setup.pager->prefetch_ahead(*region, {2});  // declined: nothing is farther away
  EXPECT_TRUE(agree());
  EXPECT_EQ(setup.pager->evict(*region, pages_between(0, 6)), 3 * kLargePage);
  EXPECT_EQ(setup.used_pages(), 0U);
  EXPECT_TRUE(agree());
  EXPECT_TRUE(holds(*region, bytes));
}

TEST(ManagedPager, RegionGivesItsChargeBackWhenItGoes) {
  PagerSetup setup(4);
  auto region = setup.reserve(3);
  setup.pager->begin(*region, {0, 1}, kCaller);  // never ended
  setup.pager->prefetch(*region, {2}, kCaller);
  region.reset();
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.spy->held(), 0U);
}

TEST(ManagedPager, PinsNestAndKeepPagesIn) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  setup.pager->begin(*region, {1, 0, 1}, kCaller);  // each page counts once
  setup.pager->begin(*region, {1, 2}, kCaller);
  EXPECT_EQ(setup.pager->evict(*region, {0, 1, 2}), 0U);
  setup.pager->end(*region, {0, 1}, kCaller);
  EXPECT_EQ(setup.pager->region_stats(*region).pinned_pages, 2U);
  EXPECT_EQ(setup.pager->evict(*region, {0, 1, 2}), kPage);
  setup.pager->end(*region, {2, 1, 2}, kCaller);
  EXPECT_EQ(setup.pager->evict(*region, {0, 1, 2}), 2 * kPage);
}

TEST(ManagedPager, EmptyRequestsAreFine) {
  PagerSetup setup(1);
  const auto region = setup.reserve(1);
  run_step(*setup.pager, *region, {});
  EXPECT_EQ(setup.pager->prefetch(*region, {}, kCaller), 0U);
  setup.pager->prefetch_ahead(*region, {});
  EXPECT_EQ(setup.pager->evict(*region, {}), 0U);
}

TEST(ManagedPager, PrefetchTellsWhatItChargedAndDoesNotPin) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  EXPECT_EQ(setup.pager->prefetch(*region, {0, 1}, kCaller), 2 * kPage);
  EXPECT_EQ(setup.pager->prefetch(*region, {0, 1, 2}, kCaller), kPage);
  EXPECT_EQ(setup.pager->prefetch(*region, {0, 1, 2}, kCaller), 0U);
  EXPECT_EQ(setup.pager->region_stats(*region).pinned_pages, 0U);
  EXPECT_EQ(take_stock(*setup.pager, *region), (Pages{0, 1, 2}));
}

TEST(ManagedPager, FiguresTellHitsFromLoads) {
  PagerSetup setup(2);
  const auto region = setup.reserve(3);
  run_step(*setup.pager, *region, {0});
  run_step(*setup.pager, *region, {0});
  setup.pager->prefetch_ahead(*region, {1});
  setup.pager->synchronize();
  run_step(*setup.pager, *region, {1});
  run_step(*setup.pager, *region, {2});
  const PagerStats stats = setup.pager->stats();
  EXPECT_EQ(stats.demand_loads, 2U);
  EXPECT_EQ(stats.hits, 2U);
  EXPECT_EQ(stats.ahead_loads, 1U);
  EXPECT_EQ(stats.ahead_declined, 0U);
  EXPECT_EQ(stats.ahead_failed, 0U);
  EXPECT_EQ(stats.loaded_bytes, 3 * kPage);
  EXPECT_EQ(stats.evicted_bytes, kPage);
}

TEST(ManagedPager, ShortLastPageIsCountedInSystemPages) {
  PagerSetup setup(3);
  const auto region = setup.pager->reserve(2 * kPage + 100, Access::kReadMostly);
  const auto other = setup.reserve(3);
  run_step(*setup.pager, *region, {0, 1, 2});
  EXPECT_EQ(setup.budget->stats().used, 2 * kPage + 4096);
  run_step(*setup.pager, *other, {0, 1, 2});  // the short page alone makes no room for a whole one
  EXPECT_EQ(setup.budget->stats().used, 3 * kPage);
  EXPECT_EQ(setup.pager->stats().evicted_bytes, 2 * kPage + 4096);
}

// ---- which pages go ----------------------------------------------------------------------------

TEST(ManagedPager, WithoutAScheduleTheLeastRecentlyUsedGoes) {
  PagerSetup setup(3);
  const auto region = setup.reserve(4);
  for (const PageIndex page : {0, 1, 2, 0}) run_step(*setup.pager, *region, {page});
  run_step(*setup.pager, *region, {3});
  EXPECT_EQ(take_stock(*setup.pager, *region), (Pages{0, 2, 3}));
}

TEST(ManagedPager, WithAScheduleTheFarthestNextUseGoes) {
  PagerSetup setup(3);
  const auto region = setup.reserve(5);
  setup.pager->set_schedule(*region, {{0}, {1}, {2}, {3}, {4}});
  for (const PageIndex page : {0, 1, 2}) {
    setup.pager->advance(*region, page);
    run_step(*setup.pager, *region, {page});
  }
  setup.pager->advance(*region, 3);
  run_step(*setup.pager, *region, {3});  // page 2 has just been read: it is the farthest away
  EXPECT_EQ(take_stock(*setup.pager, *region), (Pages{0, 1, 3}));
}

TEST(ManagedPager, CyclicPassMovesTheOptimumOnly) {
  constexpr std::size_t kPages = 16;
  constexpr std::size_t kCap = 10;
  PagerSetup setup(kCap);
  const auto region = setup.reserve(kPages);
  std::vector<Pages> steps;
  for (PageIndex page = 0; page < kPages; ++page) steps.push_back({page});
  setup.pager->set_schedule(*region, steps);
  const auto pass = [&] {
    for (PageIndex page = 0; page < kPages; ++page) {
      setup.pager->advance(*region, page);
      run_step(*setup.pager, *region, {page});
    }
  };
  pass();
  const std::uint64_t before = setup.pager->stats().loaded_bytes;
  constexpr std::size_t kPasses = 6;
  for (std::size_t i = 0; i < kPasses; ++i) pass();
  // Belady's bound, one page in flight included. Least recently used would load all 16 each pass.
  EXPECT_LE(setup.pager->stats().loaded_bytes - before, kPasses * (kPages - kCap + 1) * kPage);
}

TEST(ManagedPager, IdleRegionsGoFirstTheLongestIdleBeforeTheOthers) {
  PagerSetup setup(4);
  const auto older = setup.reserve(1);
  const auto newer = setup.reserve(1);
  const auto mine = setup.reserve(4);
  run_step(*setup.pager, *mine, {0, 1});
  run_step(*setup.pager, *older, {0});
  run_step(*setup.pager, *newer, {0});
  run_step(*setup.pager, *mine, {2});
  EXPECT_EQ(setup.pager->region_stats(*older).resident_pages, 0U);
  EXPECT_EQ(setup.pager->region_stats(*newer).resident_pages, 1U);
  run_step(*setup.pager, *mine, {3});
  EXPECT_EQ(setup.pager->region_stats(*newer).resident_pages, 0U);
  EXPECT_EQ(take_stock(*setup.pager, *mine), (Pages{0, 1, 2, 3}));
}

TEST(ManagedPager, RegionsInUseGoAfterOnesOwnPages) {
  PagerSetup setup(4);
  const auto other = setup.reserve(2);
  const auto mine = setup.reserve(4);
  run_step(*setup.pager, *other, {0, 1});
  setup.pager->set_active(*other, true);
  run_step(*setup.pager, *mine, {0, 1});
  run_step(*setup.pager, *mine, {2});
  EXPECT_EQ(setup.pager->region_stats(*other).resident_pages, 2U);
  run_step(*setup.pager, *mine, {0, 1, 2});  // needs more than its own
  EXPECT_EQ(setup.pager->region_stats(*other).resident_pages, 1U);
  setup.pager->set_active(*other, false);
  run_step(*setup.pager, *mine, {3});
  EXPECT_EQ(setup.pager->region_stats(*other).resident_pages, 0U);
  EXPECT_EQ(take_stock(*setup.pager, *mine), (Pages{0, 1, 2, 3}));
}

TEST(ManagedPager, RegionsGoInTheirTurnAndThoseWithoutNever) {
  PagerSetup setup(6);
  const auto first = setup.reserve(2);
  const auto second = setup.reserve(2);
  const auto third = setup.reserve(2);
  const auto mine = setup.reserve(4);
  for (const auto& each : {first, second, third}) run_step(*setup.pager, *each, {0, 1});
  setup.pager->set_turn(*first, 2);
  setup.pager->set_turn(*second, std::nullopt);
  setup.pager->set_turn(*third, 1);
  const auto left = [&](const auto& region) {
    return setup.pager->region_stats(*region).resident_pages;
  };
  run_step(*setup.pager, *mine, {0, 1});
  EXPECT_EQ(left(third), 0U);
  EXPECT_EQ(left(first), 2U);
  run_step(*setup.pager, *mine, {0, 1, 2, 3});
  EXPECT_EQ(left(first), 0U);
  EXPECT_EQ(left(second), 2U);
  setup.pager->begin(*mine, {0, 1, 2, 3}, kCaller);
  EXPECT_THROW(run_step(*setup.pager, *third, {0}), CapExceededError);
  EXPECT_EQ(left(second), 2U);
  setup.pager->end(*mine, {0, 1, 2, 3}, kCaller);
}

TEST(ManagedPager, OtherUsersOfTheBudgetAreLeftAlone) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  setup.budget->charge(Tag::kActivations, 2 * kPage);
  run_step(*setup.pager, *region, {0, 1});
  run_step(*setup.pager, *region, {2, 3});
  EXPECT_EQ(setup.budget->stats().used_by_tag[1], 2 * kPage);
  EXPECT_EQ(setup.used_pages(), 4U);
  EXPECT_EQ(take_stock(*setup.pager, *region), (Pages{2, 3}));
  setup.budget->release(Tag::kActivations, 2 * kPage);
}

TEST(ManagedPager, RequestThatCannotFitLeavesWhatIsResident) {
  PagerSetup setup(4);
  const auto model = setup.reserve(4);
  const auto large = setup.reserve(8);
  run_step(*setup.pager, *model, {0, 1, 2, 3});
  try {
    setup.pager->begin(*large, pages_between(0, 5), kCaller);
    ADD_FAILURE() << "5 pages under a cap of 4";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.requested, 5 * kPage);
    EXPECT_EQ(error.cap, 4 * kPage);
    EXPECT_EQ(error.used, 4 * kPage);
    EXPECT_NE(std::string(error.what()).find("Raise the cap to at least 320.00 KiB"),
              std::string::npos)
        << error.what();
  }
  EXPECT_EQ(setup.pager->region_stats(*large).pinned_pages, 0U);
  EXPECT_EQ(take_stock(*setup.pager, *model), (Pages{0, 1, 2, 3}));
}

TEST(ManagedPager, PagesThatAreReadMakeARequestFailUntilTheyAreEnded) {
  PagerSetup setup(3);
  const auto region = setup.reserve(6);
  setup.pager->begin(*region, {0, 1}, kCaller);
  EXPECT_THROW(setup.pager->begin(*region, {2, 3}, kCaller), CapExceededError);
  EXPECT_THROW(setup.pager->prefetch(*region, {2, 3}, kCaller), CapExceededError);
  EXPECT_EQ(setup.used_pages(), 2U);
  setup.pager->end(*region, {0, 1}, kCaller);
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {2, 3}));
}

// ---- prefetching ahead -------------------------------------------------------------------------

struct Ahead : ::testing::Test {
  // Pages of `region` that are resident once `pages` were asked for.
  Pages after_asking(const Pages& pages) {
    setup.pager->prefetch_ahead(*region, pages);
    setup.pager->synchronize();
    return take_stock(*setup.pager, *region);
  }
  PagerSetup setup{3};
  std::shared_ptr<ManagedRegion> region = setup.reserve(6);
};

TEST_F(Ahead, TakesFreeRoom) {
  run_step(*setup.pager, *region, {0, 1});
  EXPECT_EQ(after_asking({2}), (Pages{0, 1, 2}));
  EXPECT_EQ(setup.pager->stats().ahead_loads, 1U);
}

TEST_F(Ahead, TakesPagesOfIdleRegions) {
  const auto idle = setup.reserve(3);
  run_step(*setup.pager, *idle, {0, 1, 2});
  EXPECT_EQ(after_asking({2, 3}), (Pages{2, 3}));
  EXPECT_EQ(setup.pager->region_stats(*idle).resident_pages, 1U);
}

TEST_F(Ahead, TakesOwnPagesThatAreReadLater) {
  setup.pager->set_schedule(*region, {{0}, {1}, {2}, {3}, {4}, {5}});
  run_step(*setup.pager, *region, {0, 1, 2});
  setup.pager->advance(*region, 2);
  EXPECT_EQ(after_asking({3}), (Pages{0, 1, 3}));  // 2 comes again after 3, 0 and 1
}

TEST_F(Ahead, DeclinesWhereItWouldTakeWhatIsReadSooner) {
  setup.pager->set_schedule(*region, {{0}, {1}, {2}, {3}, {4}, {5}});
  run_step(*setup.pager, *region, {1, 2, 3});
  setup.pager->advance(*region, 0);
  EXPECT_EQ(after_asking({4}), (Pages{1, 2, 3}));
  EXPECT_EQ(setup.pager->stats().ahead_declined, 1U);
  EXPECT_EQ(setup.pager->stats().evicted_bytes, 3 * kPage);  // by taking stock
}

TEST_F(Ahead, DeclinesForPagesThatNoStepReads) {
  run_step(*setup.pager, *region, {0, 1, 2});
  EXPECT_EQ(after_asking({4}), (Pages{0, 1, 2}));
}

TEST_F(Ahead, LeavesRegionsInUseAlone) {
  const auto busy = setup.reserve(3);
  run_step(*setup.pager, *busy, {0, 1, 2});
  setup.pager->set_active(*busy, true);
  EXPECT_EQ(after_asking({0}), Pages{});
  EXPECT_EQ(setup.pager->region_stats(*busy).resident_pages, 3U);
}

TEST_F(Ahead, TakesNothingWhereItDeclines) {
  const auto idle = setup.reserve(1);
  const auto busy = setup.reserve(2);
  run_step(*setup.pager, *idle, {0});
  run_step(*setup.pager, *busy, {0, 1});
  setup.pager->set_active(*busy, true);
  EXPECT_EQ(after_asking({0, 1}), Pages{});
  EXPECT_EQ(setup.pager->stats().ahead_declined, 1U);
  EXPECT_EQ(setup.pager->stats().evicted_bytes, 0U);
  EXPECT_EQ(setup.pager->region_stats(*idle).resident_pages, 1U);
}

TEST_F(Ahead, PagesThatAreThereAreNotLoadedAgain) {
  run_step(*setup.pager, *region, {0, 1});
  EXPECT_EQ(after_asking({0, 1}), (Pages{0, 1}));
  EXPECT_EQ(setup.pager->stats().loaded_bytes, 2 * kPage);
  EXPECT_EQ(setup.pager->stats().ahead_loads, 0U);
}

TEST_F(Ahead, ReturnsWhileTheLoadIsHeldUp) {
  Gate loading;
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { loading.wait(); });
  };
  setup.pager->prefetch_ahead(*region, {0, 1});
  ASSERT_TRUE(eventually([&] { return setup.pager->stats().ahead_loads == 1; }));
  // The caller's stream waits for the load; the caller does not.
  const OwnedStream stream(setup.device);
  const OwnedEvent read(setup.device);
  setup.pager->begin(*region, {0}, stream.get());
  setup.device->event_record(read.get(), stream.get());
  EXPECT_EQ(setup.pager->stats().hits, 1U);
  EXPECT_FALSE(setup.device->event_done(read.get()));
  loading.open();
  setup.device->event_synchronize(read.get());
  setup.pager->end(*region, {0}, stream.get());
}

// ---- who waits for whom ------------------------------------------------------------------------

TEST(ManagedPager, CallersThreadWaitsForTheLoad) {
  PagerSetup setup(2);
  const auto region = setup.reserve(2);
  Gate loading;
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { loading.wait(); });
  };
  Running begin([&] { setup.pager->begin(*region, {0}, kCaller); });
  EXPECT_FALSE(eventually([&] { return begin.ended(); }, milliseconds(50)));
  loading.open();
  begin.join();
}

TEST(ManagedPager, PageGoesOnlyAfterItsLastReader) {
  PagerSetup setup(2);
  const auto region = setup.reserve(3);
  const OwnedStream first(setup.device);
  const OwnedStream second(setup.device);
  Gate reading;
  for (const OwnedStream* stream : {&first, &second}) {
    setup.pager->begin(*region, {0}, stream->get());
  }
  run_on(second.get(), [&] { reading.wait(); });
  setup.pager->end(*region, {0}, second.get());
  setup.pager->end(*region, {0}, first.get());  // a later reader, on another stream, ends sooner
  Running evict([&] { EXPECT_EQ(setup.pager->evict(*region, {0}), kPage); });
  EXPECT_FALSE(eventually([&] { return evict.ended(); }, milliseconds(50)));
  EXPECT_EQ(setup.device->calls()["managed_evict"], 0U);
  EXPECT_EQ(setup.used_pages(), 1U);
  reading.open();
  evict.join();
}

TEST(ManagedPager, PageGoesOnlyAfterItsLoad) {
  PagerSetup setup(2);
  const auto region = setup.reserve(2);
  Gate loading;
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { loading.wait(); });
  };
  setup.pager->prefetch_ahead(*region, {0});
  Running evict([&] { setup.pager->evict(*region, {0}); });
  EXPECT_FALSE(eventually([&] { return evict.ended(); }, milliseconds(50)));
  EXPECT_EQ(setup.device->calls()["managed_evict"], 0U);
  loading.open();
  evict.join();
  EXPECT_EQ(setup.used_pages(), 0U);
}

TEST(ManagedPager, RegionGoesOnlyAfterItsLoadsAndReaders) {
  PagerSetup setup(3);
  auto region = setup.reserve(3);
  const OwnedStream stream(setup.device);
  Gate working;
  setup.pager->begin(*region, {0}, stream.get());
  run_on(stream.get(), [&] { working.wait(); });
  setup.pager->end(*region, {0}, stream.get());
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle load_stream) {
    run_on(load_stream, [&] { working.wait(); });
  };
  setup.pager->prefetch_ahead(*region, {1, 2});
  Running end([&] { region.reset(); });
  EXPECT_FALSE(eventually([&] { return end.ended(); }, milliseconds(50)));
  EXPECT_EQ(setup.device->calls()["managed_release"], 0U);
  working.open();
  end.join();
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.spy->held(), 0U);
}

// ---- bytes -------------------------------------------------------------------------------------

TEST(ManagedPager, BytesAreRightAfterAnySequenceAlsoWhereNothingWasBegun) {
  for (const Access access : {Access::kReadMostly, Access::kReadWrite}) {
    PagerSetup setup(3);
    const auto region = setup.reserve(7, access);
    Bytes bytes = fill(*region, 1);
    std::mt19937 random(1);
    for (int i = 0; i < 300; ++i) {
      const auto page = static_cast<PageIndex>(random() % region->page_count());
      const auto next = static_cast<PageIndex>((page + 1) % region->page_count());
      switch (random() % 5) {
        case 0:
          setup.pager->evict(*region, {page, next});
          break;
        case 1:
          setup.pager->prefetch(*region, {page, next}, kCaller);
          break;
        case 2:
          setup.pager->prefetch_ahead(*region, {page});
          break;
        case 3: {
          const Bytes update = pattern(100, random());
          const std::size_t offset = page * kPage + random() % (kPage - 100);
          std::memcpy(region->address() + offset, update.data(), update.size());
          std::copy(update.begin(), update.end(),
                    bytes.begin() + static_cast<std::ptrdiff_t>(offset));
          break;
        }
        default:
          run_step(*setup.pager, *region, {page});
      }
      ASSERT_TRUE(holds(*region, bytes));
      ASSERT_LE(setup.budget->stats().used, 3 * kPage);
    }
    EXPECT_LE(setup.spy->peak(), 3 * kPage);
  }
}

// ---- what the device writes ---------------------------------------------------------------------

TEST(ManagedPager, WhatWasWrittenIsKeptInWholeBlocksOfAReadMostlyRegion) {
  using Range = std::pair<std::uintptr_t, std::size_t>;
  constexpr std::size_t kBlock = Device::kManagedBlock;
  PagerSetup setup(4);
  std::vector<Range> kept;
  setup.spy->on_keep = [&](std::uintptr_t address, std::size_t nbytes, StreamHandle) {
    kept.emplace_back(address, nbytes);
  };
  const auto region = setup.pager->reserve(2 * kBlock + kPage + 5, Access::kReadMostly);
  const auto start = reinterpret_cast<std::uintptr_t>(region->address());
  region->note_write(1, 1, kCaller);
  region->note_write(kBlock - 1, 2, kCaller);
  region->note_write(2 * kBlock + 1, kPage, kCaller);  // the last block is a short one
  region->note_write(100, 0, kCaller);
  EXPECT_EQ(kept, (std::vector<Range>{
                      {start, kBlock}, {start, 2 * kBlock}, {start + 2 * kBlock, kPage + 4096}}));
  EXPECT_THROW(region->note_write(2 * kBlock, kPage + 6, kCaller), std::out_of_range);
  kept.clear();
  const auto writable = setup.pager->reserve(kBlock, Access::kReadWrite);
  writable->note_write(0, 100, kCaller);
  EXPECT_TRUE(kept.empty());
}

TEST(ManagedPager, ReadMostlyRegionIsFilledBeforeItLoads) {
  PagerSetup setup(4);
  const Bytes bytes = pattern(100, 1);
  const auto region = setup.pager->reserve(2 * kPage, Access::kReadMostly);
  EXPECT_THROW(region->write(2 * kPage - 99, bytes.data(), 100), std::out_of_range);
  region->write(kPage, bytes.data(), 100);
  run_step(*setup.pager, *region, {1});
  EXPECT_EQ(std::memcmp(region->address() + kPage, bytes.data(), 100), 0);
  EXPECT_THROW(region->write(0, bytes.data(), 100), ScheduleError);
  const auto writable = setup.pager->reserve(kPage, Access::kReadWrite);
  run_step(*setup.pager, *writable, {0});
  EXPECT_NO_THROW(writable->write(0, bytes.data(), 100));
}

// ---- the rest ----------------------------------------------------------------------------------

TEST(ManagedPager, BadScheduleChangesNothing) {
  PagerSetup setup(2);
  const auto region = setup.reserve(3);
  setup.pager->set_schedule(*region, {{0}, {1}, {2}});
  EXPECT_THROW(setup.pager->set_schedule(*region, {{0}, {3}}), std::out_of_range);
  EXPECT_THROW(setup.pager->advance(*region, 3), std::out_of_range);
  EXPECT_NO_THROW(setup.pager->advance(*region, 2));
}

TEST(ManagedPager, DeviceThatCannotManageIsRefusedWithItsReason) {
  struct Unmanaged : HostDevice {
    DeviceInfo info() const override {
      DeviceInfo info = HostDevice::info();
      info.no_managed_reason = "this GPU cannot";
      return info;
    }
  };
  try {
    ManagedPager::create(std::make_shared<Unmanaged>(), std::make_shared<Budget>(1), kPage);
    FAIL() << "a pager for a device that cannot";
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find("this GPU cannot"), std::string::npos);
  }
}

TEST(ManagedPager, ForkedChildIsToldAndLeavesCleanly) {
  PagerSetup setup(2);
  auto region = setup.reserve(2);
  run_step(*setup.pager, *region, {0});
  setup.pager->synchronize();
  EXPECT_TRUE(forked_child_is_told(setup, region, 1));
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {0, 1}));  // the parent is none the worse
}

}  // namespace
}  // namespace penstock
