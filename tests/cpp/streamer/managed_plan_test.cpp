// The managed pager where a plan keeps pages: what passes moves and nothing else, victims whose
// readers are done, and evictions that go on beside loads.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "error/error.hpp"
#include "streamer/streamer.hpp"
#include "support/pager_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;
using Steps = std::vector<Pages>;

constexpr milliseconds kSoon{50};  // in which what must not happen would show

Steps one_page_each(PageIndex count) {
  Steps steps;
  for (PageIndex page = 0; page < count; ++page) steps.push_back({page});
  return steps;
}

// ---- which pages go ----------------------------------------------------------------------------

TEST(ManagedPlan, PagesThatAreNotKeptGoInTheOrderOfTheirUseAndKeptOnesLast) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  region->keep({0, 1});
  for (const PageIndex page : {0, 2, 1, 3}) run_step(*setup.pager, *region, {page});
  run_step(*setup.pager, *region, {4});  // 2 goes
  EXPECT_TRUE(region->settled({0, 1, 3, 4}, {}));
  run_step(*setup.pager, *region, {5});
  EXPECT_TRUE(region->settled({0, 1, 4, 5}, {}));
  run_step(*setup.pager, *region, {5, 6, 7});  // 4 and one that is kept, the least recently used
  EXPECT_TRUE(region->settled({1, 5, 6, 7}, {}));
  run_step(*setup.pager, *region, {0});  // it is still kept
  EXPECT_TRUE(region->settled({0, 1}, {}));
  EXPECT_THROW(region->keep({8}), std::out_of_range);
}

TEST(ManagedPlan, LookAheadLeavesKeptPagesAndThoseThatAreUsedSooner) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  region->set_schedule(one_page_each(8));
  region->keep({0, 7});
  setup.pager->prefetch(*region, {0, 7, 3, 4}, kCaller);
  setup.pager->advance(*region, 2);
  setup.pager->prefetch_ahead(*region, {5});
  setup.pager->synchronize();
  EXPECT_TRUE(region->settled({0, 3, 4, 7}, {}));
  EXPECT_EQ(setup.pager->stats().ahead_declined, 1U);
  setup.pager->advance(*region, 3);
  run_step(*setup.pager, *region, {3});
  setup.pager->advance(*region, 4);
  setup.pager->prefetch_ahead(*region, {5});
  setup.pager->synchronize();
  EXPECT_TRUE(region->settled({0, 4, 5, 7}, {}));
}

TEST(ManagedPlan, NoOneWaitsForAReaderWhereAnotherPageMayGo) {
  for (const bool ahead : {false, true}) {
    Gate reading;
    PagerSetup setup(4);
    const auto region = setup.reserve(8);
    region->set_schedule(one_page_each(8));
    region->keep({7});
    const OwnedStream slow(setup.device);
    const OwnedStream quick(setup.device);
    setup.pager->prefetch(*region, {7}, kCaller);
    setup.pager->begin(*region, {0}, slow.get());
    run_on(slow.get(), [&] { reading.wait(); });
    setup.pager->end(*region, {0}, slow.get());  // the oldest use
    for (const PageIndex page : {1, 2}) {
      setup.pager->begin(*region, {page}, quick.get());
      setup.pager->end(*region, {page}, quick.get());
    }
    setup.device->stream_synchronize(quick.get());
    setup.pager->advance(*region, 2);
    if (ahead) {
      setup.pager->prefetch_ahead(*region, {3});
    } else {
      setup.pager->prefetch(*region, {3}, kCaller);
    }
    const auto loaded = [&] { return region->settled({0, 3, 7}, {}); };
    ASSERT_TRUE(eventually(loaded, milliseconds(5000)));
    EXPECT_FALSE(region->settled({1}, {}));
    reading.open();
  }
}

TEST(ManagedPlan, ReaderIsWaitedForWhereNoOtherPageMayGo) {
  Gate reading;
  PagerSetup setup(2);
  const auto region = setup.reserve(4);
  region->keep({3});
  const OwnedStream slow(setup.device);
  setup.pager->prefetch(*region, {3}, kCaller);
  setup.pager->begin(*region, {0}, slow.get());
  run_on(slow.get(), [&] { reading.wait(); });
  setup.pager->end(*region, {0}, slow.get());
  Running begin([&] { run_step(*setup.pager, *region, {1}); });
  EXPECT_FALSE(eventually([&] { return begin.ended(); }, kSoon));
  EXPECT_EQ(setup.device->calls()["managed_evict"], 0U);
  reading.open();
  begin.join();
  EXPECT_TRUE(region->settled({1, 3}, {}));  // the kept one was not taken instead
}

// ---- passes ------------------------------------------------------------------------------------

struct PlannedPasses {
  PlannedPasses(std::size_t cap, PageIndex count, PageIndex each, const Pages& kept)
      : setup(cap), region(setup.reserve(count)), bytes(fill(*region, 5)), streamer(region) {
    for (PageIndex page = 0; page < count; page += each) {
      steps.push_back(pages_between(page, std::min(count, page + each)));
      streamer.define(static_cast<StepId>(steps.size() - 1), steps.back());
    }
    region->keep(kept);
    std::vector<StepId> order(steps.size());
    std::iota(order.begin(), order.end(), StepId{0});
    streamer.follow(order, steps);
  }
  void run(StreamHandle stream) {
    streamer.begin_pass(stream);
    for (StepId id = 0; id < steps.size(); ++id) {
      streamer.begin(id, stream);
      const auto look = [this, id] {
        for (const PageIndex page : steps[id]) {
          const std::size_t at = page * kPage;
          if (std::memcmp(region->address() + at, bytes.data() + at, kPage) != 0) ++wrong;
        }
      };
      if (stream.value == nullptr) {
        look();
      } else {
        run_on(stream, look);
      }
      streamer.end(id, stream);
    }
    streamer.end_pass(stream);
  }

  /// Pages loaded, and misses, since the last call.
  std::pair<std::uint64_t, std::uint64_t> since() {
    const StreamerStats now = streamer.stats();
    const StreamerStats then = std::exchange(last, now);
    return {(now.loaded_bytes - then.loaded_bytes) / kPage, now.misses - then.misses};
  }

  PagerSetup setup;
  std::shared_ptr<ManagedRegion> region;
  Bytes bytes;
  Streamer streamer;
  StreamerStats last;
  Steps steps;
  std::atomic<int> wrong{0};
};

Pages every(PageIndex count, PageIndex stride, std::size_t most) {
  Pages pages;
  for (PageIndex page = 0; page < count && pages.size() < most; page += stride) {
    pages.push_back(page);
  }
  return pages;
}

TEST(ManagedPlan, PassMovesWhatIsNotKeptAndMissesNothing) {
  struct Case {
    std::size_t cap;
    PageIndex count;
    PageIndex each;
    Pages kept;
  };
  const std::vector<Case> cases = {
      {10, 24, 1, pages_between(0, 5)}, {10, 24, 2, every(24, 4, 5)},
      {16, 40, 2, every(40, 5, 8)},     {12, 25, 3, pages_between(20, 23)},
      {20, 64, 1, every(64, 6, 10)},    {32, 48, 4, every(48, 3, 16)},
  };
  for (const Case& each : cases) {
    for (const bool own_stream : {false, true}) {
      SCOPED_TRACE(std::to_string(each.count) + " pages under " + std::to_string(each.cap) +
                   (own_stream ? " on a stream" : ""));
      PlannedPasses passes(each.cap, each.count, each.each, each.kept);
      const OwnedStream stream(passes.setup.device);
      const auto run_passes = [&](int count) {
        for (int pass = 0; pass < count; ++pass) {
          passes.run(own_stream ? stream.get() : kCaller);
          passes.setup.device->stream_synchronize(stream.get());
          passes.setup.pager->synchronize();
        }
        return passes.since();
      };
      run_passes(2);
      const auto [loads, misses] = run_passes(8);
      // Batches need not end where passes do.
      EXPECT_NEAR(static_cast<double>(loads),
                  8.0 * static_cast<double>(each.count - each.kept.size()),
                  static_cast<double>(passes.region->ahead_batch() - 1));
      EXPECT_EQ(misses, 0U);
      EXPECT_EQ(passes.wrong, 0);
      EXPECT_LE(passes.setup.spy->peak(), each.cap * kPage);
      if (HasFailure()) return;
    }
  }
}

TEST(ManagedPlan, PassesThatFollowEachOtherMoveNoMore) {
  PlannedPasses passes(16, 40, 2, every(40, 5, 8));
  passes.setup.device->delay_calls_of("managed_prefetch", std::chrono::microseconds(200));
  passes.setup.device->delay_calls_of("managed_evict", std::chrono::microseconds(200));
  const OwnedStream stream(passes.setup.device);
  for (int pass = 0; pass < 3; ++pass) passes.run(stream.get());
  const StreamerStats before = passes.streamer.stats();
  constexpr int kPasses = 8;
  for (int pass = 0; pass < kPasses; ++pass) passes.run(stream.get());
  passes.setup.device->stream_synchronize(stream.get());
  passes.setup.pager->synchronize();
  const StreamerStats after = passes.streamer.stats();
  // What the first and the last of them have ahead may differ by a window.
  EXPECT_LE(after.loaded_bytes - before.loaded_bytes, (kPasses * (40 - 8) + 8) * kPage);
  EXPECT_EQ(after.misses, before.misses);
  EXPECT_EQ(passes.wrong, 0);
}

TEST(ManagedPlan, AllThatFitsStaysThoughItIsNotKept) {
  PlannedPasses passes(10, 10, 1, pages_between(0, 3));
  for (int pass = 0; pass < 4; ++pass) {
    passes.run(kCaller);
    passes.setup.pager->synchronize();
  }
  EXPECT_EQ(passes.streamer.stats().loaded_bytes, 10 * kPage);
}

TEST(ManagedPlan, LookAheadTakesWhatIsNotKeptAndNotUsedByOthers) {
  PagerSetup setup(40);
  const auto region = setup.reserve(100);
  EXPECT_EQ(region->ahead_window(), 20U);  // no plan
  EXPECT_EQ(region->ahead_batch(), 5U);
  region->set_schedule(one_page_each(100));
  region->keep(pages_between(0, 20));
  EXPECT_EQ(region->ahead_batch(), 5U);
  EXPECT_EQ(region->ahead_window(), 20U - 5U + 1U + 20U);  // with those kept, to be loaded
  setup.budget->charge(Tag::kActivations, 4 * kPage);
  EXPECT_EQ(region->ahead_batch(), 4U);
  setup.budget->release(Tag::kActivations, 4 * kPage);
  const auto other = setup.reserve(8);
  run_step(*setup.pager, *other, pages_between(0, 8));
  EXPECT_EQ(region->ahead_batch(), 5U);
  setup.pager->set_active(*other, true);
  EXPECT_EQ(region->ahead_batch(), 3U);
  region->keep(pages_between(0, 90));  // more than there is room for
  EXPECT_EQ(region->ahead_batch(), 1U);
  EXPECT_EQ(region->ahead_window(), 1U + 32U);
}

TEST(ManagedPlan, LookAheadLeavesRoomForWhatIsInUseAndNoMore) {
  PagerSetup setup(40);
  const auto region = setup.reserve(100);
  region->set_schedule({pages_between(0, 30), {50}, pages_between(60, 72)});
  region->keep(pages_between(0, 20));
  setup.pager->prefetch(*region, pages_between(0, 20), kCaller);
  EXPECT_EQ(region->ahead_window(), 20U - 5U + 1U);
  setup.pager->advance(*region, 0);
  setup.pager->begin(*region, pages_between(0, 30), kCaller);  // ten of them pass through
  EXPECT_EQ(region->ahead_window(), 20U - 10U - 5U + 1U);
  setup.pager->end(*region, pages_between(0, 30), kCaller);
  EXPECT_EQ(region->ahead_window(), 20U - 5U + 1U);
  region->keep(pages_between(0, 25));
  EXPECT_EQ(region->ahead_window(), 15U - 3U + 1U);  // all that is kept is there
  setup.pager->evict(*region, {0, 1});
  EXPECT_EQ(region->ahead_window(), 15U - 3U + 1U + 2U);
}

TEST(ManagedPlan, PagesOfAStepThatHasEndedGoBeforeTheNextBegins) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  region->set_schedule({{0, 1}, {2, 3}, {4, 5}});
  region->keep({7});
  setup.pager->prefetch(*region, {7}, kCaller);
  setup.pager->advance(*region, 0);
  run_step(*setup.pager, *region, {0, 1});
  setup.pager->prefetch_ahead(*region, {2, 3});
  setup.pager->synchronize();
  EXPECT_TRUE(region->settled({2, 3, 7}, {}));
  EXPECT_EQ(setup.pager->stats().ahead_declined, 0U);
}

TEST(ManagedPlan, StepsThatTakeMostOfTheRingMissNothing) {
  // Beside what is kept there is room for one step and a batch.
  PlannedPasses passes(26, 64, 16, every(64, 8, 8));  // fourteen of each step pass through
  for (int pass = 0; pass < 6; ++pass) {
    passes.run(kCaller);
    passes.setup.pager->synchronize();
    if (pass == 1) static_cast<void>(passes.since());
  }
  EXPECT_EQ(passes.since(), (std::pair<std::uint64_t, std::uint64_t>{4 * (64 - 8), 0}));
  EXPECT_EQ(passes.wrong, 0);
}

// ---- evictions beside loads --------------------------------------------------------------------

// Holds the first eviction back in its call, on the evict thread.
struct HeldEviction : ::testing::Test {
  void hold_evictions() {
    setup.spy->on_evict = [this](std::uintptr_t, std::size_t, StreamHandle) {
      evicting.open();
      go_on.wait();
    };
  }
  Gate evicting;
  Gate go_on;
  PagerSetup setup{4};
  std::shared_ptr<ManagedRegion> region = setup.reserve(8);
  Bytes bytes = fill(*region, 2);
};

TEST_F(HeldEviction, DoesNotStopALoadThatHasRoom) {
  run_step(*setup.pager, *region, {0, 1});
  hold_evictions();
  Running evict([&] { EXPECT_EQ(setup.pager->evict(*region, {0}), kPage); });
  evicting.wait();
  run_step(*setup.pager, *region, {2});
  EXPECT_TRUE(region->settled({2}, {}));
  setup.pager->prefetch_ahead(*region, {3});
  EXPECT_TRUE(eventually([&] { return region->settled({3}, {}); }, milliseconds(5000)));
  EXPECT_FALSE(evict.ended());
  go_on.open();
  evict.join();
}

TEST_F(HeldEviction, LetsADemandPassALoadAheadThatWaitsForIt) {
  region->set_schedule(one_page_each(8));
  run_step(*setup.pager, *region, {0, 1, 2});
  hold_evictions();
  Running evict([&] { setup.pager->evict(*region, {0}); });
  evicting.wait();
  setup.pager->prefetch_ahead(*region, {3, 4});  // one has room, and one has not
  Running begin([&] { run_step(*setup.pager, *region, {5}); });
  EXPECT_TRUE(eventually([&] { return begin.ended(); }, milliseconds(5000)));
  EXPECT_FALSE(region->settled({3}, {}));
  go_on.open();
  begin.join();
  evict.join();
  setup.pager->synchronize();
  EXPECT_TRUE(holds(*region, bytes));
  EXPECT_LE(setup.spy->peak(), 4 * kPage);
}

TEST_F(HeldEviction, IsWaitedForByWhoWantsThePage) {
  run_step(*setup.pager, *region, {0});
  hold_evictions();
  Running evict([&] { EXPECT_EQ(setup.pager->evict(*region, {0, 1}), kPage); });
  evicting.wait();
  std::vector<std::unique_ptr<Running>> begins;
  for (const PageIndex page : {0, 1}) {  // one that is absent is dropped all the same
    begins.push_back(
        std::make_unique<Running>([&, page] { setup.pager->begin(*region, {page}, kCaller); }));
  }
  EXPECT_FALSE(eventually([&] { return begins[0]->ended() || begins[1]->ended(); }, kSoon));
  go_on.open();
  evict.join();
  for (const auto& begin : begins) begin->join();
  EXPECT_TRUE(region->settled({0, 1}, {}));
  EXPECT_EQ(setup.used_pages(), 2U);
  EXPECT_EQ(setup.spy->held(), 2 * kPage);  // the device has them, too
  setup.pager->end(*region, {0, 1}, kCaller);
}

TEST_F(HeldEviction, IsEnoughForADemandThatNeedsNoMore) {
  run_step(*setup.pager, *region, {0, 1, 2, 3});
  hold_evictions();
  Running evict([&] { EXPECT_EQ(setup.pager->evict(*region, {0, 1}), 2 * kPage); });
  evicting.wait();
  Running begin([&] { run_step(*setup.pager, *region, {4, 5}); });
  EXPECT_FALSE(eventually([&] { return begin.ended(); }, kSoon));
  go_on.open();
  evict.join();
  begin.join();
  EXPECT_TRUE(region->settled({2, 3, 4, 5}, {}));
  EXPECT_EQ(setup.pager->stats().evicted_bytes, 2 * kPage);
}

TEST_F(HeldEviction, PinnedPageIsNeverTaken) {
  setup.pager->begin(*region, {0, 1}, kCaller);
  run_step(*setup.pager, *region, {2, 3});
  hold_evictions();
  Running begin([&] { run_step(*setup.pager, *region, {4}); });
  evicting.wait();
  EXPECT_TRUE(region->settled({0, 1}, {}));
  go_on.open();
  begin.join();
  EXPECT_THROW(run_step(*setup.pager, *region, {5, 6, 7}), CapExceededError);
  EXPECT_TRUE(region->settled({0, 1}, {}));
}

TEST(ManagedPlan, RoomIsMadeAheadOfPagesWhoseReadersAreDone) {
  PagerSetup setup(8);
  const auto region = setup.reserve(16);
  region->set_schedule(one_page_each(16));
  region->keep({0, 1, 2, 3});
  const OwnedStream stream(setup.device);
  for (PageIndex page = 0; page < 7; ++page) {
    setup.pager->advance(*region, page);
    setup.pager->begin(*region, {page}, stream.get());
    setup.pager->end(*region, {page}, stream.get());
  }
  setup.device->stream_synchronize(stream.get());
  setup.pager->prefetch_ahead(*region, {7});
  setup.pager->synchronize();
  EXPECT_EQ(setup.used_pages(), 7U);
  EXPECT_FALSE(region->settled({4}, {}));
  EXPECT_TRUE(region->settled({0, 1, 2, 3, 5, 6, 7}, {}));
}

TEST(ManagedPlan, RoomAheadWaitsForNoReader) {
  Gate reading;
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  region->set_schedule(one_page_each(8));
  region->keep({0});
  const OwnedStream slow(setup.device);
  for (PageIndex page = 0; page < 3; ++page) {
    setup.pager->advance(*region, page);
    setup.pager->begin(*region, {page}, slow.get());
    run_on(slow.get(), [&] { reading.wait(); });
    setup.pager->end(*region, {page}, slow.get());
  }
  setup.pager->prefetch_ahead(*region, {3});
  setup.pager->synchronize();  // would wait for the readers, too, if they were waited for
  EXPECT_EQ(setup.used_pages(), 4U);
  reading.open();
}

// ---- waiting for what was asked for ------------------------------------------------------------

TEST(ManagedPlan, StepWaitsForWhatWasAskedForAheadInsteadOfDemandingIt) {
  Gate loading;
  PagerSetup setup(8);
  const auto region = setup.reserve(8);
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle) { loading.wait(); };
  setup.pager->prefetch_ahead(*region, {0, 1});
  setup.pager->prefetch_ahead(*region, {2, 3, 4});
  Running begin([&] { run_step(*setup.pager, *region, {3}); });
  EXPECT_FALSE(eventually([&] { return begin.ended(); }, kSoon));
  loading.open();
  begin.join();
  EXPECT_EQ(setup.pager->stats().hits, 1U);
  EXPECT_EQ(setup.pager->stats().demand_loads, 0U);
  EXPECT_EQ(setup.device->calls()["managed_prefetch"], 2U);
}

TEST(ManagedPlan, StepDemandsWhatWasAskedForInVain) {
  PagerSetup setup(2);
  const auto region = setup.reserve(4);
  setup.device->delay_calls_of("managed_seal", std::chrono::microseconds(20000));
  setup.device->fail_nth_call_of("managed_prefetch", 0);
  setup.pager->prefetch_ahead(*region, {2});
  run_step(*setup.pager, *region, {2});
  EXPECT_EQ(setup.pager->stats().ahead_failed, 1U);
  EXPECT_EQ(setup.pager->stats().demand_loads, 1U);
  EXPECT_EQ(setup.used_pages(), 1U);
}

TEST(ManagedPlan, PageOfTheStepThatBeginsIsNotTakenBeforeItIsPinned) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  region->set_schedule(one_page_each(8));
  region->keep({7});
  setup.pager->prefetch(*region, {7}, kCaller);
  setup.pager->prefetch(*region, {1}, kCaller);  // ahead of the use of 0
  setup.pager->advance(*region, 0);
  run_step(*setup.pager, *region, {0});
  setup.pager->prefetch_ahead(*region, {2});
  setup.pager->advance(*region, 1);
  setup.pager->prefetch_ahead(*region, {3});  // and room after that
  setup.pager->synchronize();
  EXPECT_TRUE(region->settled({1, 2, 3}, {}));
  EXPECT_EQ(setup.used_pages(), 4U);
}

TEST(ManagedPlan, PageOfTheStepThatBeginsIsLoadedAheadBeforeItIsPinned) {
  PagerSetup setup(3);
  const auto region = setup.reserve(8);
  region->set_schedule(one_page_each(8));
  region->keep({7});
  setup.pager->prefetch(*region, {7, 0, 2}, kCaller);
  setup.pager->advance(*region, 0);
  setup.pager->advance(*region, 1);
  setup.pager->prefetch_ahead(*region, {1});  // asked for by a step before
  setup.pager->synchronize();
  EXPECT_TRUE(region->settled({1, 2, 7}, {}));
}

TEST(ManagedPlan, ForkedChildDoesNotWaitForWhatItsParentAskedFor) {
  Gate loading;
  Gate in_call;
  PagerSetup setup(4);
  auto region = setup.reserve(4);
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle) {
    in_call.open();
    loading.wait();
  };
  setup.pager->prefetch_ahead(*region, {0});
  in_call.wait();
  EXPECT_TRUE(forked_child_is_told(setup, region, 0));
  loading.open();
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {0}));
}

}  // namespace
}  // namespace penstock
