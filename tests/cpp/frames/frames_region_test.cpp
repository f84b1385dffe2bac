// What a region of frames promises: bytes read between begin and end are right, frames are what was
// arranged and never more than the cap, and no frame is overwritten while somebody reads it.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "error/error.hpp"
#include "schedule/page_lists.hpp"
#include "support/frames_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// ---- arranging ---------------------------------------------------------------------------------

TEST(FramesArrange, TakesOwnFramesAndTheRingAndNothingElse) {
  FramesSetup setup(8, 16);
  EXPECT_EQ(setup.used_pages(), 0U);
  setup.region->arrange(arranged(16, 3, 4));
  EXPECT_EQ(setup.region->frame_count(), 7U);
  EXPECT_EQ(setup.used_pages(), 7U);
  EXPECT_EQ(setup.spy->frames(), 7);
  EXPECT_EQ(setup.region->stats().resident_bytes, 7 * kPage);
  EXPECT_EQ(setup.region->stats().resident_pages, 0U);
  for (PageIndex page = 0; page < 16; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_EQ(setup.spy->most_frames(), 7);
  EXPECT_EQ(setup.region->frames_stats().remaps, 0U);
}

TEST(FramesArrange, PagesOfOneSlotShareItsMemory) {
  FramesSetup setup(2, 4);
  setup.region->arrange(arranged(4, 0, 2));
  setup.region->begin({0}, kCaller);
  setup.device->fill(setup.region->address(), 42, kPage, kCaller);
  EXPECT_EQ(std::to_integer<int>(setup.region->address()[2 * kPage + 77]), 42);
  setup.region->end({0}, kCaller);
}

TEST(FramesArrange, PagesInPlaceStaySoWithoutBeingLoadedAgain) {
  FramesSetup setup(12, 12);
  setup.region->arrange(arranged(12, 6, 2));
  for (PageIndex page = 0; page < 6; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  for (const auto& [own, ring] : {std::pair(8, 3), std::pair(6, 1), std::pair(10, 2)}) {
    setup.region->arrange(
        arranged(12, static_cast<std::size_t>(own), static_cast<std::size_t>(ring)));
    for (PageIndex page = 0; page < 6; ++page) EXPECT_TRUE(reads_right(setup, {page}));
    EXPECT_EQ(setup.loads(), 6U);
  }
  for (PageIndex page = 0; page < 12; ++page) EXPECT_TRUE(reads_right(setup, {page}));
}

TEST(FramesArrange, PageOfTheRingKeepsItsBytesWhenItGetsAFrameOfItsOwn) {
  FramesSetup setup(8, 8);
  setup.region->arrange(arranged(8, 0, 4));
  EXPECT_TRUE(reads_right(setup, {0}));
  EXPECT_TRUE(reads_right(setup, {5}));
  Arrangement next = arranged(8, 0, 2);
  next.slot[5] = next.slot[0] = Arrangement::kOwnFrame;
  setup.region->arrange(next);
  EXPECT_TRUE(reads_right(setup, {0, 5}));
  EXPECT_EQ(setup.loads(), 2U);
  EXPECT_EQ(setup.region->frame_count(), 4U);
}

TEST(FramesArrange, ShrinkingGivesBytesBack) {
  FramesSetup setup(10, 10);
  setup.region->arrange(arranged(10, 10, 0));
  for (PageIndex page = 0; page < 10; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  setup.region->arrange(arranged(10, 2, 3));
  EXPECT_EQ(setup.used_pages(), 5U);
  EXPECT_EQ(setup.spy->frames(), 5);
  for (PageIndex page = 0; page < 10; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_EQ(setup.spy->most_frames(), 10);
}

TEST(FramesArrange, BeyondTheCapLeavesAllAsItWas) {
  FramesSetup setup(5, 10);
  setup.region->arrange(arranged(10, 2, 2));
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));
  try {
    setup.region->arrange(arranged(10, 4, 3));
    FAIL() << "7 frames do not fit under a cap of 5";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.cap, 5 * kPage);
    EXPECT_EQ(error.requested, 2 * kPage);
    EXPECT_EQ(error.used, 5 * kPage);
  }
  EXPECT_EQ(setup.used_pages(), 4U);
  EXPECT_EQ(setup.spy->frames(), 4);
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));
  EXPECT_EQ(setup.loads(), 3U);
}

TEST(FramesArrange, IsRefusedWhilePagesAreInUse) {
  FramesSetup setup(8, 8);
  setup.region->begin({3}, kCaller);
  EXPECT_THROW(setup.region->arrange(arranged(8, 2, 2)), ScheduleError);
  EXPECT_THROW(setup.region->prepare_capture(), ScheduleError);
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 3));
  setup.region->end({3}, kCaller);
  EXPECT_NO_THROW(setup.region->arrange(arranged(8, 2, 2)));
}

TEST(FramesArrange, WaitsAMomentForPagesThatAnotherThreadUses) {
  FramesSetup setup(8, 8);
  setup.region->begin({3}, kCaller);
  setup.region->begin({3, 4}, kCaller);
  Running ends([&] {
    std::this_thread::sleep_for(milliseconds(20));
    setup.region->end({3}, kCaller);
    std::this_thread::sleep_for(milliseconds(20));
    setup.region->end({3, 4}, kCaller);
  });
  EXPECT_NO_THROW(setup.region->arrange(arranged(8, 2, 2)));
  ends.join();
  EXPECT_EQ(setup.region->frame_count(), 4U);
}

TEST(FramesArrange, BeginTellsWhetherPagesGiveWay) {
  FramesSetup setup(6, 8);
  const auto gives_way = [&](const Pages& pages) {
    const bool told = setup.region->begin(pages, kCaller);
    setup.region->end(pages, kCaller);
    return told;
  };
  EXPECT_TRUE(gives_way({0}));
  EXPECT_FALSE(gives_way({}));
  setup.region->arrange(arranged(8, 2, 3));
  EXPECT_FALSE(gives_way({0}));
  EXPECT_FALSE(gives_way({0, 1}));
  EXPECT_TRUE(gives_way({1, 2}));
  EXPECT_FALSE(gives_way({}));
}

TEST(FramesArrange, ContradictionsAreRefused) {
  FramesSetup setup(8, 4);
  EXPECT_THROW(setup.region->arrange(arranged(5, 1, 2)), std::invalid_argument);
  Arrangement bad = arranged(4, 1, 2);
  bad.slot[3] = 2;
  EXPECT_THROW(setup.region->arrange(bad), std::invalid_argument);
  EXPECT_EQ(setup.used_pages(), 0U);
  EXPECT_THROW(
      FramesRegion::create(FramePool::create(setup.device, setup.budget, 2 * kPage), setup.tier),
      std::invalid_argument);
}

TEST(FramesArrange, WaitsForReadersOfPagesThatMove) {
  FramesSetup setup(4, 4);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->arrange(arranged(4, 0, 1));
  setup.region->begin({2}, stream.get());
  look.look(*setup.region, {2}, stream.get(), milliseconds(20));
  setup.region->end({2}, stream.get());
  Arrangement next = arranged(4, 4, 0);
  next.slot[2] = 0;
  next.ring = 1;
  next.slot[0] = 0;  // takes the place that page 2 has
  setup.region->arrange(next);
  for (PageIndex page = 0; page < 4; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  setup.device->stream_synchronize(stream.get());
  EXPECT_EQ(look.wrong(), 0);
  EXPECT_EQ(look.looks(), 1);
}

// ---- beginning and ending ----------------------------------------------------------------------

class FramesUse : public ::testing::TestWithParam<int> {};  // how many streams read

TEST_P(FramesUse, RandomStepsReadTheirBytesLate) {
  constexpr std::size_t kPages = 14;
  const auto stream_count = static_cast<std::size_t>(GetParam());
  std::mt19937 random(static_cast<unsigned>(GetParam()));
  for (const std::size_t own : {0U, 4U}) {
    FramesSetup setup(own + 5, kPages, 100);
    std::vector<ReaderStream> streams;
    for (std::size_t i = 0; i < stream_count; ++i) {
      streams.emplace_back(setup);
    }
    LateLook look(setup.bytes);
    setup.region->arrange(arranged(kPages, own, 5));
    for (int step = 0; step < 150; ++step) {
      Pages pages;
      for (std::size_t i = random() % 3 + 1; i > 0; --i) {
        push_unique(pages, static_cast<PageIndex>(random() % kPages));
      }
      const StreamHandle stream =
          streams.empty() ? kCaller : streams[random() % streams.size()].get();
      setup.region->begin(pages, stream);
      look.look(*setup.region, pages, stream, microseconds(random() % 4 * 200));
      setup.region->end(pages, stream);
    }
    for (const auto& stream : streams) setup.device->stream_synchronize(stream.get());
    EXPECT_EQ(look.wrong(), 0);
    EXPECT_GT(look.looks(), 150);
    EXPECT_LE(setup.spy->most_frames(), static_cast<int>(own + 5));
    EXPECT_TRUE(setup.tier->settled(*setup.spy));
    EXPECT_EQ(setup.tier->given_up(), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Streams, FramesUse, ::testing::Values(0, 1, 3));

TEST(FramesRegion, ReaderWaitsForASlowCopyAndTheHostDoesNot) {
  Gate copying;
  FramesSetup setup(2, 4);
  setup.spy->on_copy = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { copying.wait(); });
  };
  setup.region->arrange(arranged(4, 0, 2));
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->begin({0}, stream.get());  // returns with the copy under way
  look.look(*setup.region, {0}, stream.get());
  setup.region->end({0}, stream.get());
  std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(look.looks(), 0);
  EXPECT_FALSE(setup.region->settled({0}, {}));
  copying.open();
  setup.device->stream_synchronize(stream.get());
  EXPECT_EQ(look.looks(), 1);
  EXPECT_EQ(look.wrong(), 0);
  setup.region->begin({0}, kCaller);  // learns that the load is over
  setup.region->end({0}, kCaller);
  EXPECT_TRUE(setup.region->settled({0}, {}));
  EXPECT_FALSE(setup.region->settled({0, 1}, {}));
}

TEST(FramesRegion, CopyWaitsForEveryStreamThatReadsThePlace) {
  Gate reading;
  FramesSetup setup(1, 2);
  setup.region->arrange(arranged(2, 0, 1));
  const ReaderStream one(setup);
  const ReaderStream two(setup);
  LateLook look(setup.bytes);
  for (const ReaderStream* stream : {&one, &two}) {
    setup.region->begin({0}, stream->get());
    if (stream == &one) run_on(stream->get(), [&] { reading.wait(); });
    look.look(*setup.region, {0}, stream->get());
    setup.region->end({0}, stream->get());
  }
  setup.device->stream_synchronize(two.get());
  setup.region->begin({1}, two.get());
  look.look(*setup.region, {1}, two.get());
  setup.region->end({1}, two.get());
  std::this_thread::sleep_for(milliseconds(10));
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 0));  // page 1 is held back
  reading.open();
  setup.device->stream_synchronize(one.get());
  setup.device->stream_synchronize(two.get());
  EXPECT_EQ(look.looks(), 3);
  EXPECT_EQ(look.wrong(), 0);
}

TEST(FramesRegion, PagesOfOneStepOnOneSlotAreMovedApart) {
  FramesSetup setup(6, 8);
  setup.region->arrange(arranged(8, 2, 3));
  EXPECT_TRUE(reads_right(setup, {2, 5}));  // both on slot 0
  EXPECT_EQ(setup.region->frames_stats().remaps, 1U);
  EXPECT_EQ(setup.region->frame_count(), 5U);  // the ring had another place
  EXPECT_TRUE(reads_right(setup, {2, 5}));
  EXPECT_EQ(setup.loads(), 2U);
  for (PageIndex page = 0; page < 8; ++page) EXPECT_TRUE(reads_right(setup, {page}));
}

TEST(FramesRegion, CollisionTakesAnExtraFrameBeforeThatOfAResidentPage) {
  FramesSetup setup(4, 6);
  setup.region->arrange(arranged(6, 2, 1));
  EXPECT_TRUE(
      reads_right(setup, {2, 3}));  // not on frames of pages 0 and 1, though these are empty
  EXPECT_EQ(setup.region->frame_count(), 4U);
  EXPECT_TRUE(reads_right(setup, {0, 1, 2, 3}));
  EXPECT_EQ(setup.loads(), 4U);
  EXPECT_TRUE(reads_right(setup, {2, 3, 4}));  // the cap is full: a resident page gives way
  EXPECT_EQ(setup.region->frame_count(), 4U);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
}

TEST(FramesRegion, MoreThanTheCapAtOnceIsRefusedAndAllGoesOn) {
  FramesSetup setup(3, 6);
  setup.region->arrange(arranged(6, 1, 2));
  setup.region->begin({0, 1}, kCaller);
  try {
    setup.region->begin({2, 3}, kCaller);
    FAIL() << "4 pages do not fit on 3 frames";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.cap, 3 * kPage);
    EXPECT_EQ(error.used, 3 * kPage);
    EXPECT_EQ(error.requested, kPage);
    EXPECT_NE(std::string(error.what()).find("Raise the cap"), std::string::npos);
  }
  EXPECT_EQ(setup.region->stats().pinned_pages, 2U);
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 0));
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 1));
  setup.region->end({0, 1}, kCaller);
  EXPECT_TRUE(reads_right(setup, {2, 3}));
  EXPECT_EQ(setup.used_pages(), 3U);
}

TEST(FramesRegion, PageThatAnotherStepReadsStaysWhenOneOfItsReadersEnds) {
  FramesSetup setup(1, 2);
  setup.region->begin({0}, kCaller);
  setup.region->begin({0}, kCaller);
  setup.region->end({0}, kCaller);
  EXPECT_THROW(setup.region->begin({1}, kCaller), CapExceededError);
  setup.region->end({0}, kCaller);
  EXPECT_TRUE(reads_right(setup, {1}));
}

TEST(FramesRegion, WrongPagesAndEndsChangeNothing) {
  FramesSetup setup(4, 4);
  FramesRegion& region = *setup.region;
  region.begin({0, 2}, kCaller);
  EXPECT_THROW(region.begin({1, 4}, kCaller), std::out_of_range);
  EXPECT_THROW(region.end({0, 4}, kCaller), std::out_of_range);
  EXPECT_THROW(region.end({0, 1, 2}, kCaller), ScheduleError);
  EXPECT_THROW(region.end({0, 0}, kCaller), ScheduleError);
  EXPECT_THROW(region.evict({7}), std::out_of_range);
  EXPECT_THROW(region.load_ahead({7}), std::out_of_range);
  EXPECT_THROW(region.set_schedule({{7}}), std::out_of_range);
  EXPECT_EQ(region.stats().pinned_pages, 2U);
  region.end({0, 2}, kCaller);
  EXPECT_EQ(region.stats().pinned_pages, 0U);
  EXPECT_NO_THROW(region.begin({}, kCaller));
  EXPECT_NO_THROW(region.end({}, kCaller));
}

// ---- without an arrangement --------------------------------------------------------------------

TEST(FramesUnarranged, TakesFramesAsPagesAreDemandedUpToTheCapAndThenVictims) {
  FramesSetup setup(3, 6);
  for (PageIndex page = 0; page < 3; ++page) {
    EXPECT_TRUE(reads_right(setup, {page}));
    EXPECT_EQ(setup.used_pages(), page + 1);
  }
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));
  EXPECT_EQ(setup.loads(), 3U);
  EXPECT_TRUE(reads_right(setup, {0}));
  EXPECT_TRUE(reads_right(setup, {3}));  // in place of 1, which was used the longest ago
  EXPECT_EQ(setup.loads(), 4U);
  EXPECT_TRUE(reads_right(setup, {0, 2, 3}));
  EXPECT_EQ(setup.loads(), 4U);
  for (PageIndex page = 0; page < 6; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_EQ(setup.used_pages(), 3U);
  EXPECT_EQ(setup.spy->most_frames(), 3);
}

TEST(FramesUnarranged, PageWhoseLoadFailedKeepsItsFrameToItself) {
  FramesSetup setup(3, 6);
  setup.spy->fail_late(1);
  EXPECT_THROW(setup.region->begin({0}, kCaller), DeviceError);
  EXPECT_TRUE(reads_right(setup, {1}));
  EXPECT_EQ(setup.used_pages(), 2U);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_EQ(setup.used_pages(), 2U);
}

TEST(FramesUnarranged, FollowsTheRoomThatOthersLeave) {
  FramesSetup setup(3, 6);
  {
    const auto other = setup.pool->try_take(Tag::kActivations);
    EXPECT_TRUE(reads_right(setup, {0, 1}));
    EXPECT_THROW(setup.region->begin({0, 1, 2}, kCaller), CapExceededError);
  }
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));
}

// ---- evicting ----------------------------------------------------------------------------------

TEST(FramesEvict, GivesEverythingBack) {
  for (const bool ring : {false, true}) {
    FramesSetup setup(6, 12);
    if (ring) setup.region->arrange(arranged(12, 2, 4));
    for (PageIndex page = 0; page < 12; ++page) EXPECT_TRUE(reads_right(setup, {page}));
    EXPECT_EQ(setup.region->evict(pages_between(0, 12)), 6 * kPage);
    EXPECT_EQ(setup.used_pages(), 0U);
    EXPECT_EQ(setup.spy->frames(), 0);
    EXPECT_EQ(setup.region->stats().resident_pages, 0U);
    EXPECT_EQ(setup.region->evict(pages_between(0, 12)), 0U);
    for (PageIndex page = 0; page < 12; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  }
}

TEST(FramesEvict, LeavesPagesInUse) {
  FramesSetup setup(4, 4);
  setup.region->begin({1}, kCaller);
  EXPECT_TRUE(reads_right(setup, {0, 2}));
  EXPECT_EQ(setup.region->evict(pages_between(0, 4)), 2 * kPage);
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 1));
  setup.region->end({1}, kCaller);
  EXPECT_TRUE(reads_right(setup, {1}));
  EXPECT_EQ(setup.loads(), 3U);
}

TEST(FramesEvict, WaitsForReadersAndForLoadsUnderWay) {
  FramesSetup setup(4, 4);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->arrange(arranged(4, 4, 0));
  setup.region->begin({0}, stream.get());
  look.look(*setup.region, {0}, stream.get(), milliseconds(20));
  setup.region->end({0}, stream.get());
  setup.spy->on_copy = [](std::uintptr_t, std::size_t, StreamHandle copies) {
    run_on(copies, [] { std::this_thread::sleep_for(milliseconds(10)); });
  };
  EXPECT_EQ(setup.region->load_ahead({1, 2}), 2U);
  EXPECT_EQ(setup.region->evict(pages_between(0, 4)), 4 * kPage);
  EXPECT_EQ(look.looks(), 1);  // it had to wait for that
  EXPECT_EQ(look.wrong(), 0);
}

TEST(FramesEvict, PartOfAnArrangementIsDemandedAfterwards) {
  FramesSetup setup(6, 8);
  setup.region->arrange(arranged(8, 3, 3));
  for (PageIndex page = 0; page < 8; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_EQ(setup.region->evict({0, 1, 4}), 2 * kPage);  // page 4's frame is page 7's too
  EXPECT_EQ(setup.used_pages(), 4U);
  for (PageIndex page = 0; page < 8; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_LE(setup.used_pages(), 6U);
  setup.region->arrange(arranged(8, 3, 3));
  EXPECT_EQ(setup.used_pages(), 6U);
  for (PageIndex page = 0; page < 8; ++page) EXPECT_TRUE(reads_right(setup, {page}));
}

// ---- loading ahead -----------------------------------------------------------------------------

TEST(FramesAhead, LoadsIntoFreePlacesAndCountsFromTheFirst) {
  FramesSetup setup(4, 8);
  setup.region->arrange(arranged(8, 1, 3));  // 1 4 7 | 2 5 | 3 6
  setup.region->set_schedule({{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}});
  EXPECT_EQ(setup.region->load_ahead({0, 1, 2, 3, 4, 5}), 4U);  // 1 is needed before 4
  EXPECT_EQ(setup.loads(), 4U);
  EXPECT_EQ(setup.region->load_ahead({0, 1}), 2U);
  EXPECT_EQ(setup.loads(), 4U);
  for (PageIndex page = 0; page < 4; ++page) {
    setup.region->advance(page);
    EXPECT_TRUE(reads_right(setup, {page}));
  }
  EXPECT_EQ(setup.region->frames_stats().demand_loads, 0U);
  EXPECT_EQ(setup.region->load_ahead({4, 5, 6, 7}), 3U);
}

TEST(FramesAhead, NeverOverwritesAPageInUseOrNeededSooner) {
  FramesSetup setup(1, 2);
  setup.region->arrange(arranged(2, 0, 1));
  setup.region->set_schedule({{0}, {1}});
  setup.region->advance(0);
  setup.region->begin({0}, kCaller);
  EXPECT_EQ(setup.region->load_ahead({1}), 0U);  // in use
  setup.region->end({0}, kCaller);
  EXPECT_EQ(setup.region->load_ahead({1}), 1U);
  EXPECT_EQ(setup.region->load_ahead({0}), 0U);  // 1 is needed sooner
  setup.region->advance(1);
  EXPECT_TRUE(reads_right(setup, {1}));
  EXPECT_EQ(setup.region->load_ahead({0}), 1U);
  EXPECT_EQ(setup.region->frames_stats().demand_loads, 1U);
}

TEST(FramesAhead, PageWithoutAPlaceIsLeftToBeDemanded) {
  FramesSetup setup(4, 4);
  setup.region->set_schedule({{0}, {1}});
  EXPECT_EQ(setup.region->load_ahead({0, 1}), 0U);
  EXPECT_EQ(setup.used_pages(), 0U);
}

TEST(FramesAhead, NeverWaits) {
  Gate gate;
  FramesSetup setup(2, 4);
  setup.spy->on_copy = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { gate.wait(); });
  };
  setup.tier->ask_ready = [](PageIndex page) { return page != 1; };
  setup.tier->on_fetch = [&](PageIndex page) {
    if (page == 1) gate.wait();
  };
  setup.region->arrange(arranged(4, 0, 2));
  setup.region->set_schedule({{0}, {1}, {2}, {3}});
  Running ahead([&] { EXPECT_EQ(setup.region->load_ahead({0, 1, 2, 3}), 1U); });
  EXPECT_TRUE(eventually([&] { return ahead.ended(); }, milliseconds(2000)));
  EXPECT_EQ(setup.tier->fetches(), (Pages{0}));
  gate.open();
  ahead.join();
}

// ---- pages that lie together -------------------------------------------------------------------

TEST(FramesTogether, LittlePagesOfSeveralStepsAreOneCopy) {
  FramesSetup setup(6, 12, 100);
  setup.tier->together = true;
  setup.region->arrange(arranged(12, 2, 4));
  setup.region->set_schedule({{0, 1, 2}, {3, 4}, {5, 6, 7}, {8, 9, 10, 11}});
  auto copies = [&, before = setup.device->calls()["copy"]]() mutable {
    const auto now = setup.device->calls()["copy"];
    return now - std::exchange(before, now);
  };
  EXPECT_EQ(setup.region->load_ahead({0, 1, 2, 3, 4, 5, 6, 7}), 6U);  // 6 comes where 2 is needed
  EXPECT_EQ(copies(), 1U);
  for (const Pages& step : {Pages{0, 1, 2}, Pages{3, 4}, Pages{5, 6, 7}, Pages{8, 9, 10, 11}}) {
    EXPECT_TRUE(reads_right(setup, step));
  }
  EXPECT_EQ(copies(), 2U);  // {6, 7}, demanded, and the last step
  EXPECT_EQ(setup.loads(), 12U);
}

TEST(FramesTogether, CopyEndsWhereAPageIsInUseOrHasAnotherPlaceToCome) {
  FramesSetup setup(6, 12);
  setup.tier->together = true;
  setup.region->arrange(arranged(12, 0, 4));
  setup.region->begin({5}, kCaller);
  EXPECT_TRUE(reads_right(setup, {8, 10, 11}));
  EXPECT_EQ(setup.device->calls()["copy"], 3U);  // 9 was not asked for
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));    // 1 has to go elsewhere, away from 5
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 5));
  setup.region->end({5}, kCaller);
  EXPECT_TRUE(reads_right(setup, {6, 7, 8, 9}));
}

// ---- writing back ------------------------------------------------------------------------------

TEST(FramesWriteBack, ChangesOutliveEvictionAndReload) {
  FramesSetup setup(2, 4, 8);
  const ReaderStream stream(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 0, 2));
  region.begin({0, 1}, stream.get());
  const std::size_t offset = kPage - 5;
  run_on(stream.get(), [&] {
    std::this_thread::sleep_for(milliseconds(5));
    std::memset(region.address() + offset, 7, 10);
  });
  region.note_write(offset, 10, stream.get());
  region.end({0, 1}, stream.get());
  std::memset(setup.bytes.data() + offset, 7, 10);
  EXPECT_EQ(region.frames_stats().written_back_bytes, 0U);
  EXPECT_TRUE(reads_right(setup, {2, 3}));  // in their places
  EXPECT_EQ(region.frames_stats().written_back_bytes, 2 * kPage);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  region.evict(pages_between(0, 4));
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesWriteBack, IsRefusedWhereItCannotBeKeptOrIsNotInUse) {
  FramesSetup setup(4, 4);
  EXPECT_NO_THROW(setup.region->require_writable());
  EXPECT_THROW(setup.region->note_write(0, 4, kCaller), ScheduleError);
  setup.region->begin({0}, kCaller);
  EXPECT_THROW(setup.region->note_write(kPage - 1, 2, kCaller), ScheduleError);
  EXPECT_THROW(setup.region->note_write(4 * kPage - 1, 2, kCaller), std::out_of_range);
  setup.tier->writable = false;
  EXPECT_THROW(setup.region->require_writable(), ModelError);
  EXPECT_THROW(setup.region->note_write(0, 4, kCaller), ModelError);
  EXPECT_THROW(setup.region->set_writable(true), ModelError);
  setup.region->end({0}, kCaller);
  setup.region->flush();
  setup.region->evict({0});
  EXPECT_EQ(setup.region->frames_stats().written_back_bytes, 0U);
}

TEST(FramesWriteBack, WritableRegionKeepsAllWhereverItsPagesGo) {
  for (const bool verified : {false, true}) {
    FramesSetup setup(4, 6, 8);
    FramesRegion& region = *setup.region;
    region.set_writable(true);
    region.set_verify(verified);
    region.arrange(arranged(6, 1, 2));
    const auto change = [&](PageIndex page, std::uint8_t value) {
      const ReaderStream stream(setup);
      region.begin({page}, stream.get());
      run_on(stream.get(), [at = region.address() + page * kPage, value] {
        std::this_thread::sleep_for(milliseconds(2));
        std::memset(at, value, 100);
      });
      region.end({page}, stream.get());
      std::memset(setup.bytes.data() + page * kPage, value, 100);
    };
    for (PageIndex page = 0; page < 6; ++page) change(page, static_cast<std::uint8_t>(page + 1));
    setup.spy->stream_synchronize(setup.streams.front()->get());  // page 0 stays where it was
    EXPECT_TRUE(reads_right(setup, {0}));
    region.arrange(arranged(6, 0, 1));  // the pages move
    for (PageIndex page = 0; page < 6; ++page) {
      EXPECT_TRUE(reads_right(setup, {page}));
      change(page, static_cast<std::uint8_t>(page + 21));
    }
    region.evict(pages_between(0, 6));
    EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  }
}

TEST(FramesWriteBack, FailedCopyBackLosesNothing) {
  FramesSetup setup(1, 2);
  setup.region->set_writable(true);
  setup.region->begin({0}, kCaller);
  std::memset(setup.region->address(), 7, 10);
  setup.region->end({0}, kCaller);
  std::memset(setup.bytes.data(), 7, 10);
  setup.device->fail_nth_call_of("copy", 0);
  EXPECT_THROW(setup.region->evict({0}), DeviceError);
  EXPECT_TRUE(reads_right(setup, {0}));
  setup.device->fail_nth_call_of("copy", 0);
  EXPECT_THROW(setup.region->begin({1}, kCaller), DeviceError);
  EXPECT_TRUE(reads_right(setup, {0}));
  EXPECT_TRUE(reads_right(setup, {1}));
  EXPECT_TRUE(reads_right(setup, {0}));
}

// ---- pages that were written to ----------------------------------------------------------------

/// Changes the first bytes of a page as work of a stream, some time after it has come to that.
void change(FramesSetup& setup, PageIndex page, std::uint8_t value, StreamHandle stream,
            microseconds delay = {}) {
  FramesRegion& region = *setup.region;
  region.require_writable();
  region.begin({page}, stream);
  const auto write = [at = region.address() + page * kPage, value, delay] {
    std::this_thread::sleep_for(delay);
    std::memset(at, value, 100);
  };
  if (stream.value == nullptr) {
    write();
  } else {
    run_on(stream, write);
  }
  region.note_write(page * kPage, 100, stream);
  region.end({page}, stream);
  std::memset(setup.bytes.data() + page * kPage, value, 100);
}

TEST(FramesDirty, PagesAreCopiedBackOnceAndOnlyWhenTheyLeaveTheirPlace) {
  FramesSetup setup(2, 4, 8);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 0, 2));  // 0 2 | 1 3
  for (std::uint8_t value = 1; value < 10; ++value) change(setup, 0, value, kCaller);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_EQ(region.frames_stats().written_back_bytes, 0U);
  EXPECT_TRUE(reads_right(setup, {2}));
  EXPECT_EQ(region.frames_stats().written_back_bytes, kPage);
  EXPECT_TRUE(reads_right(setup, {0}));
  EXPECT_TRUE(reads_right(setup, {2, 3}));
  EXPECT_EQ(region.frames_stats().written_back_bytes, kPage);  // it was only read since
  change(setup, 3, 7, kCaller);                                // the last page, which is shorter
  region.evict({3});
  EXPECT_EQ(region.frames_stats().written_back_bytes, 2 * kPage - 8);
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, FlushKeepsAllThatStreamsHaveWrittenAndLeavesPagesInPlace) {
  FramesSetup setup(4, 4);
  const ReaderStream one(setup);
  const ReaderStream two(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 4, 0));
  change(setup, 0, 1, one.get(), milliseconds(10));
  change(setup, 1, 2, two.get(), milliseconds(5));
  EXPECT_TRUE(reads_right(setup, {2}));
  region.flush();
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  EXPECT_EQ(region.frames_stats().written_back_bytes, 2 * kPage);
  region.flush();
  EXPECT_EQ(region.frames_stats().written_back_bytes, 2 * kPage);
  EXPECT_TRUE(reads_right(setup, {0, 1, 2}));
  EXPECT_EQ(setup.loads(), 3U);
  change(setup, 0, 3, one.get(), milliseconds(5));
  region.flush();
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, FlushKeepsWhatWasWrittenToPagesStillInUse) {
  FramesSetup setup(2, 2);
  const ReaderStream stream(setup);
  FramesRegion& region = *setup.region;
  region.begin({0}, stream.get());
  run_on(stream.get(), [at = region.address()] {
    std::this_thread::sleep_for(milliseconds(20));
    std::memset(at, 7, 100);
  });
  region.note_write(0, 100, stream.get());
  region.flush();  // by another thread, between the two
  region.end({0}, stream.get());
  std::memset(setup.bytes.data(), 7, 100);
  region.evict({0});
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, PageThatIsMovedOrEvictedWaitsForItsCopyBack) {
  for (const bool evicted : {false, true}) {
    SCOPED_TRACE(evicted ? "evicted" : "moved");
    Gate copying;
    FramesSetup setup(2, 4);
    const ReaderStream stream(setup);
    FramesRegion& region = *setup.region;
    region.arrange(arranged(4, 0, 1));
    change(setup, 0, 1, kCaller);
    setup.spy->on_copy = [&](std::uintptr_t, std::size_t, StreamHandle copies) {
      run_on(copies, [&] { copying.wait(); });
    };
    LateLook look(setup.bytes);
    region.begin({2}, stream.get());  // in place of 0, which is copied back before it
    look.look(region, {2}, stream.get());
    if (evicted) region.end({2}, stream.get());
    Running opens([&] {
      std::this_thread::sleep_for(milliseconds(20));
      copying.open();
    });
    if (evicted) {
      region.evict({0});  // its addresses, through which it is being copied
    } else {
      region.begin({0}, stream.get());  // on another frame
      look.look(region, {0}, stream.get());
      region.end({0}, stream.get());
      region.end({2}, stream.get());
    }
    opens.join();
    setup.spy->stream_synchronize(stream.get());
    region.evict(pages_between(0, 4));
    EXPECT_EQ(look.wrong(), 0);
    EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  }
}

TEST(FramesDirty, ArrangingAndGivingFramesToOthersKeepsThem) {
  FramesSetup setup(4, 6);
  const ReaderStream stream(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(6, 2, 2));
  for (PageIndex page = 0; page < 4; ++page) {
    change(setup, page, static_cast<std::uint8_t>(page + 1), stream.get(), milliseconds(3));
  }
  region.arrange(arranged(6, 0, 1));
  for (PageIndex page = 0; page < 6; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  change(setup, 5, 9, stream.get(), milliseconds(3));
  region.set_active(false);
  EXPECT_TRUE(setup.pool->make_room(4 * kPage, nullptr));
  EXPECT_EQ(region.frame_count(), 0U);
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, AreKeptBesideReplays) {
  FramesSetup setup(2, 4);
  const ReaderStream graph(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 0, 2));
  region.prepare_capture();
  region.begin_capture(graph.get());
  region.end_capture(graph.get());
  for (std::uint8_t round = 1; round < 4; ++round) {
    change(setup, 0, round, kCaller);
    region.before_replay(graph.get(), region.mappings());
    LateLook look(setup.bytes);  // what a graph does: it copies from the tier
    setup.spy->copy(region.address(), setup.tier->bytes().data(), kPage, graph.get());
    look.look(region, {0}, graph.get());
    region.after_replay(graph.get());
    setup.spy->stream_synchronize(graph.get());
    EXPECT_EQ(look.wrong(), 0);
    EXPECT_TRUE(reads_right(setup, {0}));
    EXPECT_TRUE(reads_right(setup, {1}));
  }
  change(setup, 1, 9, kCaller);
  region.prepare_capture();
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, CapturedWritesAreCopiedByTheCapture) {
  FramesSetup setup(2, 2);
  const ReaderStream graph(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(2, 2, 0));
  region.prepare_capture();
  region.begin_capture(graph.get());
  change(setup, 1, 5, graph.get(), milliseconds(2));
  EXPECT_EQ(region.frames_stats().written_back_bytes, 100U);
  region.end_capture(graph.get());
  setup.spy->stream_synchronize(graph.get());
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
}

TEST(FramesDirty, CopyBackThatFailsOnItsStreamIsToldAndTriedAgain) {
  for (const bool evicted : {false, true}) {
    SCOPED_TRACE(evicted ? "evicted" : "flushed");
    FramesSetup setup(2, 2);
    change(setup, 0, 5, kCaller);
    setup.spy->fail_late(1);
    const auto keep = [&] {
      if (evicted) {
        setup.region->evict({0});
      } else {
        setup.region->flush();
      }
    };
    EXPECT_THROW(keep(), DeviceError);
    EXPECT_TRUE(reads_right(setup, {0}));
    keep();
    EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  }
}

// ---- events behind uses ------------------------------------------------------------------------

TEST(FramesEvents, ManyUsesOfPagesThatStayRecordNone) {
  FramesSetup setup(6, 8);
  const ReaderStream stream(setup);
  setup.region->arrange(arranged(8, 4, 2));
  EXPECT_TRUE(reads_right(setup, {0, 1, 2, 3}));
  const auto before = setup.device->calls()["event_record"];
  for (int use = 0; use < 1000; ++use) {
    for (const StreamHandle reader : {kCaller, stream.get()}) {
      setup.region->begin({static_cast<PageIndex>(use % 4)}, reader);
      setup.region->end({static_cast<PageIndex>(use % 4)}, reader);
    }
  }
  EXPECT_EQ(setup.device->calls()["event_record"], before);
}

TEST(FramesEvents, OneIsRecordedForAllUsesOfAStreamThatALoadWaitsFor) {
  FramesSetup setup(4, 8);
  const ReaderStream stream(setup);
  setup.region->arrange(arranged(8, 0, 4));
  setup.region->set_schedule({{4, 5, 6, 7}});
  for (int use = 0; use < 100; ++use) {
    setup.region->begin({static_cast<PageIndex>(use % 4)}, stream.get());
    setup.region->end({static_cast<PageIndex>(use % 4)}, stream.get());
  }
  auto records = [&, before = setup.device->calls()["event_record"]]() mutable {
    const auto now = setup.device->calls()["event_record"];
    return now - std::exchange(before, now);
  };
  // Behind the uses; behind what the copies waited for, on the host; behind the copy.
  EXPECT_EQ(setup.region->load_ahead({4}), 1U);
  EXPECT_EQ(records(), 3U);
  EXPECT_EQ(setup.region->load_ahead({5, 6, 7}), 3U);  // what they wait for has an event
  EXPECT_EQ(records(), 6U);
}

TEST(FramesEvents, EventThatWasRecordedBeforeALaterUseIsNotTakenForIt) {
  Gate reading;
  FramesSetup setup(2, 4);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->arrange(arranged(4, 0, 2));  // 0 2 | 1 3
  setup.region->set_schedule({{3}});
  setup.region->begin({0, 1}, stream.get());
  setup.region->end({0, 1}, stream.get());
  EXPECT_TRUE(reads_right(setup, {2}));  // an event behind the use of 0 and 1
  setup.region->begin({1}, stream.get());
  run_on(stream.get(), [&] { reading.wait(); });
  look.look(*setup.region, {1}, stream.get());
  setup.region->end({1}, stream.get());
  EXPECT_EQ(setup.region->load_ahead({3}), 1U);  // in place of 1
  std::this_thread::sleep_for(milliseconds(10));
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 1));
  reading.open();
  EXPECT_TRUE(reads_right(setup, {2}));
  setup.spy->stream_synchronize(setup.region->copy_stream());
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(look.wrong(), 0);
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 3));
}

TEST(FramesEvents, PageIsNotOverwrittenBeforeItsLastReadersOfManyStreamsAreDone) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    std::mt19937 random(seed);
    FramesSetup setup(3, 9);
    std::vector<ReaderStream> streams;
    for (int i = 0; i < 4; ++i) streams.emplace_back(setup);
    LateLook look(setup.bytes);
    setup.region->arrange(arranged(9, 1, 2));
    setup.region->set_schedule({{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8}});
    for (int use = 0; use < 60; ++use) {
      const auto page = static_cast<PageIndex>(random() % 9);
      const StreamHandle stream = streams[random() % 4].get();
      setup.region->begin({page}, stream);
      look.look(*setup.region, {page}, stream, microseconds(random() % 3 * 300));
      setup.region->end({page}, stream);
      setup.region->advance(static_cast<StepIndex>(random() % 5));
      static_cast<void>(setup.region->load_ahead({static_cast<PageIndex>(random() % 9)}));
    }
    for (const auto& stream : streams) setup.spy->stream_synchronize(stream.get());
    EXPECT_EQ(look.wrong(), 0);
    EXPECT_EQ(look.looks(), 60);
  }
}

TEST(FramesEvents, EventThatCannotBeRecordedFailsTheLoadAndTakesNothing) {
  FramesSetup setup(1, 2);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->arrange(arranged(2, 0, 1));
  setup.region->begin({0}, stream.get());
  look.look(*setup.region, {0}, stream.get(), milliseconds(10));
  setup.region->end({0}, stream.get());
  setup.device->fail_nth_call_of("event_record", 0);
  EXPECT_THROW(setup.region->begin({1}, kCaller), DeviceError);
  EXPECT_TRUE(setup.device->fired());
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_TRUE(reads_right(setup, {1}));  // after the reader still
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(look.looks(), 1);
  EXPECT_EQ(look.wrong(), 0);
}

// ---- verifying ---------------------------------------------------------------------------------

TEST(FramesVerify, FindsACopyThatIsNotItsSource) {
  FramesSetup setup(2, 4, 10);
  setup.region->arrange(arranged(4, 0, 2));
  setup.region->set_verify(true);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_TRUE(reads_right(setup, {3}));
  std::atomic<bool> flip{true};
  setup.spy->after_copy = [&](std::uintptr_t target, std::size_t nbytes, StreamHandle stream) {
    if (!flip.exchange(false)) return;
    run_on(stream,
           [target, nbytes] { reinterpret_cast<unsigned char*>(target)[nbytes / 2] ^= 1U; });
  };
  EXPECT_THROW(setup.region->begin({2}, kCaller), DeviceError);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_TRUE(reads_right(setup, {2}));
}

TEST(FramesVerify, PoisonsSharedPagesOnceTheyWereUsed) {
  FramesSetup setup(2, 3);
  setup.region->arrange(arranged(3, 1, 1));
  setup.region->set_verify(true);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->begin({0, 1}, stream.get());
  look.look(*setup.region, {0, 1}, stream.get(), milliseconds(5));
  setup.region->end({0, 1}, stream.get());
  setup.device->stream_synchronize(stream.get());
  setup.device->stream_synchronize(setup.region->copy_stream());
  EXPECT_EQ(look.wrong(), 0);
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 0));
  EXPECT_EQ(setup.region->address()[kPage], std::byte{0xFF});
  EXPECT_EQ(setup.region->address()[2 * kPage - 1], std::byte{0xFF});
  EXPECT_TRUE(reads_right(setup, {1}));  // it is not taken for what it was
}

TEST(FramesVerify, PoisonDoesNotOutliveTheMapping) {
  FramesSetup setup(2, 4);
  setup.region->arrange(arranged(4, 0, 2));
  setup.region->set_verify(true);
  const ReaderStream stream(setup);
  setup.region->begin({0, 1}, stream.get());
  run_on(stream.get(), [] { std::this_thread::sleep_for(milliseconds(10)); });
  setup.region->end({0, 1}, stream.get());
  EXPECT_EQ(setup.region->evict(pages_between(0, 4)), 2 * kPage);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
}

}  // namespace
}  // namespace penstock
