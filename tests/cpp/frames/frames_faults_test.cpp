// Whatever fails under a region of frames, and wherever: the caller gets a typed error, no failure
// vanishes, no byte is wrong, and the same region works again.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "error/error.hpp"
#include "support/frames_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr PageIndex kPages = 7;
constexpr std::size_t kCapPages = 4;

void use(FramesSetup& setup, LateLook& look, const Pages& pages, StreamHandle stream) {
  FramesRegion& region = *setup.region;
  region.begin(pages, stream);
  look.look(region, pages, stream);
  std::exception_ptr error;
  try {
    const std::size_t start = pages.front() * kPage;
    region.note_write(start, 16, stream);
  } catch (...) {
    error = std::current_exception();
  }
  region.end(pages, stream);
  if (error) std::rethrow_exception(error);
}

// All that a user does with a region: arranged, changed, evicted, without an arrangement, verified.
void cycle(FramesSetup& setup, LateLook& look, StreamHandle stream) {
  FramesRegion& region = *setup.region;
  region.set_trace(true);
  region.arrange(arranged(kPages, 1, 3));
  region.set_schedule({{0, 1}, {2, 3}, {4, 5}, {6}});
  for (StepIndex step = 0; step < 4; ++step) {
    region.advance(step);
    use(setup, look, step < 3 ? Pages{2 * step, 2 * step + 1} : Pages{6}, stream);
    region.load_ahead({(2 * step + 2) % kPages, (2 * step + 3) % kPages});
    static_cast<void>(region.settled({step}, stream));
  }
  use(setup, look, {1, 4}, stream);  // on one slot
  region.arrange(arranged(kPages, 3, 1));
  use(setup, look, {0, 5}, stream);
  region.evict(pages_between(0, kPages));
  for (PageIndex page = 0; page < kPages; ++page) use(setup, look, {page}, stream);
  region.prepare_capture();
  region.set_verify(true);
  region.arrange(arranged(kPages, 1, 1));
  use(setup, look, {0, 2}, stream);
  use(setup, look, {3}, stream);
  region.set_verify(false);
  region.evict({0, 3});
  const auto other = FramesRegion::create(setup.pool, setup.tier);
  other->begin({1}, kCaller);
  other->end({1}, kCaller);
}

class FramesEveryCallFails : public ::testing::TestWithParam<bool> {};

TEST_P(FramesEveryCallFails, LedgerIsBalancedAndTheSameRegionWorks) {
  std::uint64_t position = 0;
  for (bool fired = true; fired; ++position) {
    SCOPED_TRACE("call " + std::to_string(position) + " fails");
    FramesSetup setup(kCapPages, kPages, 3);
    std::optional<ReaderStream> stream;
    if (GetParam()) stream.emplace(setup);
    const StreamHandle reader = stream ? stream->get() : kCaller;
    LateLook look(setup.bytes);

    setup.device->fail_nth_call(position);
    bool told = false;
    try {
      cycle(setup, look, reader);
    } catch (const DeviceError& error) {
      told = true;
      EXPECT_NE(std::string(error.what()).find("injected fault"), std::string::npos);
    }
    fired = setup.device->fired();
    if (fired) {
      EXPECT_TRUE(told || setup.device->suppressed_count() > 0) << "a failure vanished";
    }
    setup.device->reset();
    setup.region->set_verify(false);
    EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
    EXPECT_EQ(setup.used_pages(), setup.region->frame_count());
    EXPECT_EQ(static_cast<std::size_t>(setup.spy->frames()), setup.region->frame_count());
    EXPECT_NO_THROW(cycle(setup, look, reader));
    setup.spy->stream_synchronize(reader);
    EXPECT_EQ(look.wrong(), 0);
    setup.region.reset();
    EXPECT_EQ(setup.budget->stats().used, 0U);
    EXPECT_EQ(setup.spy->frames(), 0);
    EXPECT_LE(setup.spy->most_frames(), static_cast<int>(kCapPages));
    EXPECT_TRUE(setup.tier->settled(*setup.spy));
    if (HasFailure()) return;
  }
  EXPECT_GT(position, 200U);  // the cycle is made of device calls
}

INSTANTIATE_TEST_SUITE_P(Streams, FramesEveryCallFails, ::testing::Bool(), [](const auto& tested) {
  return tested.param ? "OwnStream" : "CallersThread";
});

TEST(FramesFaults, RegionThatCannotBeMadeLeavesNothing) {
  for (std::uint64_t position = 0;; ++position) {
    FramesSetup setup(kCapPages, kPages);
    setup.region.reset();
    setup.device->reset();
    setup.device->fail_nth_call(position);
    try {
      setup.region = FramesRegion::create(setup.pool, setup.tier);
    } catch (const DeviceError&) {
    }
    if (!setup.device->fired()) break;
    auto calls = setup.device->calls();
    EXPECT_EQ(calls["address_release"], position);
  }
}

TEST(FramesFaults, FramesThatCannotBeMadeForAnArrangementLeaveTheOneBefore) {
  FramesSetup setup(6, 6);
  setup.region->arrange(arranged(6, 1, 1));
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  setup.device->fail_nth_call_of("frame_create", 2);
  EXPECT_THROW(setup.region->arrange(arranged(6, 4, 2)), DeviceError);
  EXPECT_EQ(setup.used_pages(), 2U);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_EQ(setup.loads(), 2U);
}

// ---- loads that fail on their stream, after the call -------------------------------------------

TEST(FramesFaults, BeginTellsOfALoadThatFailedLateAndTheNextOneWorks) {
  FramesSetup setup(4, 8);
  setup.region->arrange(arranged(8, 2, 2));
  setup.spy->fail_late(1);
  EXPECT_THROW(setup.region->begin({0, 2}, kCaller), DeviceError);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_TRUE(reads_right(setup, {0, 2}));
}

TEST(FramesFaults, BeginTellsOfALoadAheadThatFailedLate) {
  FramesSetup setup(4, 8);
  const ReaderStream stream(setup);
  setup.region->arrange(arranged(8, 2, 2));
  for (const StreamHandle reader : {kCaller, stream.get()}) {
    setup.region->evict(pages_between(0, 8));
    setup.region->arrange(arranged(8, 2, 2));
    setup.spy->fail_late(1);
    EXPECT_EQ(setup.region->load_ahead({0, 2}), 2U);
    setup.spy->stream_synchronize(setup.region->copy_stream());
    EXPECT_FALSE(setup.region->settled({0}, {}));
    EXPECT_THROW(setup.region->begin({0, 2}, reader), DeviceError);
    EXPECT_TRUE(reads_right(setup, {0, 2}));
  }
}

TEST(FramesFaults, LoadThatFailsUnderAStreamThatWaitsForItIsNotTakenForDone) {
  Gate copying;
  FramesSetup setup(2, 2);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.spy->on_copy = [&](std::uintptr_t, std::size_t, StreamHandle copies) {
    run_on(copies, [&] { copying.wait(); });
  };
  setup.spy->fail_late(1);
  setup.region->begin({0}, stream.get());
  look.look(*setup.region, {0}, stream.get());
  setup.region->end({0}, stream.get());
  copying.open();
  EXPECT_THROW(setup.spy->stream_synchronize(stream.get()), DeviceError);  // it learned of it
  EXPECT_EQ(look.looks(), 0);
  EXPECT_THROW(setup.region->begin({0}, stream.get()), DeviceError);
  EXPECT_TRUE(reads_right(setup, {0}));
}

TEST(FramesFaults, LoadThatFailedTakesNothingFromItsNeighbours) {
  FramesSetup setup(2, 4);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.region->arrange(arranged(4, 0, 2));  // 0 2 | 1 3
  setup.spy->on_copy = [](std::uintptr_t, std::size_t, StreamHandle copies) {
    run_on(copies, [] { std::this_thread::sleep_for(milliseconds(2)); });
  };
  setup.region->begin({1}, stream.get());  // not known to be over
  setup.spy->fail_late(1);
  EXPECT_THROW(setup.region->begin({0, 1}, kCaller), DeviceError);
  EXPECT_EQ(setup.region->load_ahead({3}), 0U);  // in place of 1
  look.look(*setup.region, {1}, stream.get(), milliseconds(10));
  setup.region->end({1}, stream.get());
  EXPECT_TRUE(reads_right(setup, {3}));
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(look.wrong(), 0);
  EXPECT_EQ(look.looks(), 1);
}

TEST(FramesFaults, BeginThatFailsTakesNothingFromAnotherReaderOfThePage) {
  Gate copying;
  Gate reading;
  FramesSetup setup(1, 2);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.spy->on_copy = [&](std::uintptr_t, std::size_t, StreamHandle copies) {
    run_on(copies, [&] { copying.wait(); });
  };
  setup.region->arrange(arranged(2, 0, 1));
  setup.region->begin({0}, stream.get());  // not known to be over
  run_on(stream.get(), [&] { reading.wait(); });
  copying.open();
  setup.spy->stream_synchronize(setup.region->copy_stream());
  setup.device->fail_nth_call_of("event_synchronize", 0);
  EXPECT_THROW(setup.region->begin({0}, kCaller), DeviceError);
  EXPECT_EQ(setup.region->load_ahead({1}), 0U);
  look.look(*setup.region, {0}, stream.get());
  setup.region->end({0}, stream.get());
  reading.open();
  EXPECT_TRUE(reads_right(setup, {1}));
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(look.wrong(), 0);
}

TEST(FramesFaults, FailedStepDoesNotKeepItsPages) {
  FramesSetup setup(2, 4);
  const ReaderStream stream(setup);
  setup.region->arrange(arranged(4, 0, 2));
  setup.region->begin({0, 1}, stream.get());
  run_on(stream.get(), [] { throw DeviceError("matmul", 1, "the step failed"); });
  setup.region->end({0, 1}, stream.get());
  EXPECT_EQ(setup.region->evict(pages_between(0, 4)), 2 * kPage);
  EXPECT_EQ(setup.device->last_suppressed().find("matmul"), 0U);
  EXPECT_TRUE(reads_right(setup, {2, 3}));
}

TEST(FramesFaults, FailureOfAStepIsNotThatOfTheNextLoad) {
  FramesSetup setup(1, 2);
  const ReaderStream stream(setup);
  setup.region->arrange(arranged(2, 0, 1));
  setup.region->begin({0}, stream.get());
  run_on(stream.get(), [] { throw DeviceError("matmul", 1, "the step failed"); });
  setup.region->end({0}, stream.get());
  EXPECT_TRUE(reads_right(setup, {1}));
}

TEST(FramesFaults, TierThatCannotReadIsToldAndAskedAgain) {
  FramesSetup setup(2, 4);
  bool broken = true;
  setup.tier->on_fetch = [&](PageIndex page) {
    if (page == 2 && broken) throw CheckpointError("cannot read", "weights", 2 * kPage);
  };
  setup.region->arrange(arranged(4, 0, 2));
  EXPECT_TRUE(reads_right(setup, {0}));
  EXPECT_THROW(setup.region->begin({1, 2}, kCaller), CheckpointError);
  EXPECT_TRUE(reads_right(setup, {0, 1}));  // page 0 is still in place
  EXPECT_EQ(setup.loads(), 2U);
  broken = false;
  EXPECT_TRUE(reads_right(setup, {1, 2}));
}

TEST(FramesFaults, RegionWaitsForWorkUnderWayWhenItGoes) {
  FramesSetup setup(3, 6);
  const ReaderStream stream(setup);
  LateLook look(setup.bytes);
  setup.spy->on_copy = [](std::uintptr_t, std::size_t, StreamHandle copies) {
    run_on(copies, [] { std::this_thread::sleep_for(milliseconds(3)); });
  };
  setup.region->arrange(arranged(6, 1, 2));
  setup.region->set_schedule({{0}, {1}, {2}, {3}});
  setup.region->begin({0, 1}, stream.get());
  look.look(*setup.region, {0, 1}, stream.get(), milliseconds(10));
  setup.region->end({0, 1}, stream.get());
  setup.region->advance(2);
  EXPECT_EQ(setup.region->load_ahead({3}), 1U);  // waits for the reader of 1
  setup.region.reset();
  EXPECT_EQ(look.looks(), 2);
  EXPECT_EQ(look.wrong(), 0);
  EXPECT_EQ(setup.used_pages(), 0U);
  EXPECT_EQ(setup.spy->frames(), 0);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
}

// ---- captures ----------------------------------------------------------------------------------
// The host device has no graphs: what is captured runs at once, and a replay is a task here.

TEST(FramesCapture, PagesThatACaptureLoadsAreNotInPlaceAfterIt) {
  FramesSetup setup(4, 6);
  const ReaderStream stream(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(6, 2, 2));
  EXPECT_TRUE(reads_right(setup, {0, 2}));
  region.prepare_capture();
  EXPECT_EQ(region.stats().resident_pages, 1U);  // page 0, on its own frame
  region.begin_capture(stream.get());
  for (PageIndex page = 0; page < 6; ++page) {
    region.begin({page}, stream.get());
    region.end({page}, stream.get());
  }
  EXPECT_THROW(region.begin({2, 4}, stream.get()), ScheduleError);  // on one slot
  region.end_capture(stream.get());
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(region.stats().resident_pages, 1U);
  EXPECT_EQ(setup.loads(), 2U + 5U);
  EXPECT_TRUE(reads_right(setup, {0, 1}));
  EXPECT_EQ(setup.loads(), 2U + 5U + 1U);
}

// Eight pages through a ring of four, while a pass is captured.
struct FramesCaptured : ::testing::Test {
  FramesCaptured() {
    region.arrange(arranged(8, 0, 4));
    region.prepare_capture();
    region.begin_capture(stream.get());
    static_cast<void>(since("event_wait"));
  }
  void TearDown() override {
    region.end_capture(stream.get());
    setup.spy->stream_synchronize(stream.get());
  }
  void use(const std::vector<PageIndex>& pages) {
    region.begin(pages, stream.get());
    region.end(pages, stream.get());
  }
  /// Calls of a function since this was last asked.
  std::uint64_t since(const std::string& name) {
    const std::uint64_t now = setup.device->calls()[name];
    return now - std::exchange(before[name], now);
  }

  FramesSetup setup{4, 8};
  ReaderStream stream{setup};
  FramesRegion& region = *setup.region;
  std::map<std::string, std::uint64_t> before;
};

TEST_F(FramesCaptured, HasNoEdgesThatFollowFromOthers) {
  EXPECT_EQ(region.load_ahead({0, 1, 2, 3}), 4U);
  use({3});  // after its load, and so after those before
  EXPECT_EQ(since("event_wait"), 1U);
  use({0});
  use({1, 2});
  EXPECT_EQ(since("event_wait"), 0U);
  region.begin({6}, stream.get());  // its load after {1, 2}, and so after {0} and {3}
  EXPECT_EQ(since("event_wait"), 2U);
  region.end({6}, stream.get());
  use({7});
  EXPECT_EQ(since("event_wait"), 1U);
  use({4});
  use({2});  // after 6 in its place
  EXPECT_EQ(since("event_wait"), 3U);
}

TEST_F(FramesCaptured, StepWaitsForTheLastOfItsCopiesOnly) {
  static_cast<void>(since("event_record"));
  EXPECT_EQ(region.load_ahead({0, 1, 2, 3}), 4U);
  EXPECT_EQ(since("event_record"), 4U);  // one behind each copy
  use({0, 1, 2, 3});
  EXPECT_EQ(since("event_wait"), 1U);
  EXPECT_EQ(setup.loads(), 4U);
}

TEST(FramesCapture, LateFailureBeforeACaptureIsNotForgotten) {
  FramesSetup setup(2, 2);
  setup.region->arrange(arranged(2, 2, 0));
  setup.spy->fail_late(1);
  EXPECT_EQ(setup.region->load_ahead({0}), 1U);
  setup.region->prepare_capture();
  EXPECT_EQ(setup.region->stats().resident_pages, 0U);
  EXPECT_TRUE(reads_right(setup, {0}));
}

TEST(FramesCapture, PagesStayWhereTheyAreDuringAReplayAndAreMissedAfterTheyWereMoved) {
  FramesSetup setup(4, 4);
  const ReaderStream graph(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 3, 1));
  region.prepare_capture();
  region.begin_capture(graph.get());
  EXPECT_FALSE(setup.pool->make_room(kPage, nullptr));
  region.end_capture(graph.get());
  const std::uint64_t captured = region.mappings();
  region.before_replay(graph.get(), captured);
  EXPECT_FALSE(setup.pool->make_room(kPage, nullptr));
  region.after_replay(graph.get());
  EXPECT_TRUE(setup.pool->make_room(kPage, nullptr));
  EXPECT_THROW(region.before_replay(graph.get(), captured), ScheduleError);
  EXPECT_TRUE(setup.pool->make_room(2 * kPage, nullptr));  // nor is it as if one were under way
}

TEST(FramesCapture, ReplayThatWouldCopyFromAChangedFileIsRefusedAndNoneIsUnderWay) {
  FramesSetup setup(4, 4);
  const ReaderStream graph(setup);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 3, 1));
  region.prepare_capture();
  region.begin_capture(graph.get());
  region.end_capture(graph.get());
  setup.tier->on_require = [] { throw CheckpointError("was changed", "weights", 0); };
  EXPECT_THROW(region.before_replay(graph.get(), region.mappings()), CheckpointError);
  EXPECT_TRUE(reads_right(setup, {0, 3}));  // as it may not during a replay
  setup.tier->on_require = nullptr;
  region.before_replay(graph.get(), region.mappings());
  region.after_replay(graph.get());
}

TEST(FramesCapture, ReplaysAndOtherUsesWaitForEachOther) {
  FramesSetup setup(2, 4);
  const ReaderStream graph(setup);
  const ReaderStream eager(setup);
  LateLook look(setup.bytes);
  FramesRegion& region = *setup.region;
  region.arrange(arranged(4, 0, 2));
  region.prepare_capture();
  for (int round = 0; round < 5; ++round) {
    for (int launch = 0; launch < 2; ++launch) {
      region.before_replay(graph.get(), region.mappings());
      for (PageIndex page = 0; page < 4; ++page) {
        setup.spy->copy(region.address() + page * kPage, setup.bytes.data() + page * kPage, kPage,
                        graph.get());
        look.look(region, {page}, graph.get(), milliseconds(1));
      }
      region.after_replay(graph.get());
    }
    for (const PageIndex page : {2U, 1U, 0U}) {
      region.begin({page}, eager.get());
      EXPECT_THROW(region.before_replay(graph.get(), region.mappings()), ScheduleError);
      look.look(region, {page}, eager.get(), milliseconds(1));
      region.end({page}, eager.get());
    }
  }
  region.arrange(arranged(4, 0, 1));
  setup.spy->stream_synchronize(graph.get());
  setup.spy->stream_synchronize(eager.get());
  EXPECT_EQ(look.looks(), 5 * (8 + 3));
  EXPECT_EQ(look.wrong(), 0);
}

}  // namespace
}  // namespace penstock
