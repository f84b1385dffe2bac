// The streamer over both kinds of regions: right bytes in every order of steps, the fewest loads
// and no misses in the order it expects, and figures that tell what happened.
#include "streamer/streamer.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "support/frames_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using Steps = std::vector<Pages>;

/// Steps that read `count` pages, `each` at a time, in order.
Steps steps_of(PageIndex count, PageIndex each) {
  Steps steps;
  for (PageIndex page = 0; page < count; page += each) {
    steps.push_back(pages_between(page, std::min(count, page + each)));
  }
  return steps;
}

std::vector<StepId> all_of(const Steps& steps) {
  std::vector<StepId> order(steps.size());
  std::iota(order.begin(), order.end(), StepId{0});
  return order;
}

/// A streamer that expects its steps one after the other.
struct Streaming {
  Streaming(std::shared_ptr<Region> region, const Bytes& bytes, Steps all)
      : over(std::move(region)), streamer(over), steps(std::move(all)), look(bytes) {
    for (StepId id = 0; id < steps.size(); ++id) streamer.define(id, steps[id]);
    streamer.follow(all_of(steps), steps);
  }

  void run_one(StepId id, StreamHandle stream = kCaller, microseconds delay = {}) {
    streamer.begin(id, stream);
    look.look(*over, steps[id], stream, delay);
    streamer.end(id, stream);
  }
  void run_pass(const std::vector<StepId>& ids, StreamHandle stream = kCaller,
                microseconds delay = {}) {
    streamer.begin_pass(stream);
    for (const StepId id : ids) run_one(id, stream, delay);
    streamer.end_pass(stream);
  }
  void run_pass(StreamHandle stream = kCaller, microseconds delay = {}) {
    run_pass(all_of(steps), stream, delay);
  }
  /// Pages loaded and steps that missed since this was last asked.
  std::pair<std::uint64_t, std::uint64_t> since() {
    const StreamerStats now = streamer.stats();
    const std::pair found{(now.loaded_bytes - before.loaded_bytes) / over->page_size(),
                          now.misses - before.misses};
    before = now;
    return found;
  }

  std::shared_ptr<Region> over;
  Streamer streamer;
  Steps steps;
  LateLook look;
  StreamerStats before;
};

struct FramesStreaming : FramesSetup, Streaming {
  FramesStreaming(std::size_t own, std::size_t ring, Steps all, std::size_t page_count)
      : FramesSetup(own + ring, page_count), Streaming(region, bytes, std::move(all)) {
    arrange(own, ring);
  }
  void arrange(std::size_t own, std::size_t ring) {
    region->arrange(arranged(region->page_count(), own, ring));
  }
};

// Pages of a slot that no other page has stay, as those on frames of their own do.
std::size_t staying(std::size_t page_count, std::size_t own, std::size_t ring) {
  const std::size_t streamed = page_count - own;
  if (streamed <= ring) return page_count;
  return own + (streamed < 2 * ring ? 2 * ring - streamed : 0);
}

// ---- the order that is expected ----------------------------------------------------------------

TEST(Streamer, EveryPassLoadsWhatDoesNotStayAndMissesNothing) {
  const OwnedStream stream(std::make_shared<HostDevice>());
  for (const PageIndex page_count : {6U, 11U, 16U}) {
    for (const std::size_t own : {0U, 1U, 5U}) {
      for (const std::size_t ring : {1U, 2U, 3U, 4U, 7U}) {
        for (const PageIndex each : {1U, 2U, 3U}) {
          if (each > ring || own + ring > page_count) continue;
          SCOPED_TRACE(std::to_string(page_count) + " pages, " + std::to_string(own) + " own, " +
                       std::to_string(ring) + " in the ring, steps of " + std::to_string(each));
          FramesStreaming run(own, ring, steps_of(page_count, each), page_count);
          for (int pass = 0; pass < 6; ++pass) {
            run.run_pass(stream.get());
            const auto [loads, misses] = run.since();
            if (pass < 2) continue;
            EXPECT_EQ(loads, page_count - staying(page_count, own, ring));
            EXPECT_EQ(misses, 0U);
          }
          EXPECT_EQ(run.streamer.stats().unscheduled, 0U);
          EXPECT_EQ(run.region->frames_stats().remaps, 0U);
          run.spy->stream_synchronize(stream.get());
          EXPECT_EQ(run.look.wrong(), 0);
          EXPECT_EQ(run.look.looks(), static_cast<int>(6 * page_count));
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST(Streamer, LittlePagesOfSeveralStepsComeByOneCopy) {
  const OwnedStream stream(std::make_shared<HostDevice>());
  FramesStreaming run(0, 9, steps_of(45, 1), 45);
  run.tier->together = true;
  run.run_pass(stream.get());
  run.since();
  const auto before = run.device->calls()["copy"];
  run.run_pass(stream.get());
  EXPECT_LE(run.device->calls()["copy"] - before, 45U / 4 + 1);  // half of what no step reads
  EXPECT_EQ(run.since(), std::pair(std::uint64_t{45}, std::uint64_t{0}));
  run.spy->stream_synchronize(stream.get());
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, SharedPagesDoNotShortenTheLookAhead) {
  // Page 0 is read by every step, so one pass reads more pages than there are.
  Steps steps;
  for (PageIndex page = 1; page < 13; ++page) steps.push_back({0, page});
  FramesStreaming run(1, 5, steps, 13);
  run.run_pass();
  run.run_pass();
  run.since();
  run.run_pass();
  EXPECT_EQ(run.since(), std::pair(std::uint64_t{12}, std::uint64_t{0}));
  steps.clear();
  for (PageIndex page = 3; page < 23; ++page) steps.push_back({0, 1, 2, page});
  FramesStreaming wide(3, 10, steps, 23);
  wide.streamer.prefetch();
  EXPECT_EQ(wide.tier->fetches(), pages_between(0, 13));
}

TEST(Streamer, EndOfAPassLoadsTheBeginningOfTheNext) {
  FramesStreaming run(0, 3, steps_of(7, 1), 7);
  run.run_pass();
  EXPECT_EQ(run.tier->fetches(), (Pages{0, 1, 2, 3, 4, 5, 6, 0, 1, 2}));
  run.run_one(0);
  EXPECT_EQ(run.streamer.stats().misses, 1U);  // the very first step of all
}

TEST(Streamer, PrefetchBeforeTheFirstPassLeavesNothingToMiss) {
  FramesStreaming run(2, 3, steps_of(9, 1), 9);
  run.streamer.prefetch();
  EXPECT_EQ(run.tier->fetches(), (Pages{0, 1, 2, 3, 4}));
  run.run_pass();
  EXPECT_EQ(run.streamer.stats().misses, 0U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, LateReadersOnAStreamOfTheirOwnAreWaitedFor) {
  FramesStreaming run(1, 3, steps_of(10, 1), 10);
  const ReaderStream stream(run);
  for (int pass = 0; pass < 3; ++pass) run.run_pass(stream.get(), microseconds(300));
  run.spy->stream_synchronize(stream.get());
  EXPECT_EQ(run.look.looks(), 30);
  EXPECT_EQ(run.look.wrong(), 0);
}

// ---- other orders ------------------------------------------------------------------------------

TEST(Streamer, OtherOrdersReadRightBytesAndTheCursorRecovers) {
  FramesStreaming run(1, 4, steps_of(12, 1), 12);
  const ReaderStream stream(run);
  const std::vector<std::vector<StepId>> passes = {
      {0, 1, 2, 5, 6, 7, 8, 9, 10, 11},                     // skipped
      {0, 1, 1, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 11},  // repeated
      {0, 1, 2, 3},                                         // ended early
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10},                   // nearly ended
      {11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0},               // backwards
      {},                                                   // nothing at all
      {4, 5, 6, 0, 1, 2, 9, 10, 11},                        // mixed
  };
  for (const auto& pass : passes) {
    run.run_pass(pass, stream.get(), microseconds(100));
    run.run_pass(stream.get());
    run.run_pass(stream.get());
    run.since();
    run.run_pass(stream.get());
    EXPECT_EQ(run.since(), std::pair(std::uint64_t{11}, std::uint64_t{0}));
  }
  run.spy->stream_synchronize(stream.get());
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, StepsOutsideTheOrderAreCountedAndReadRight) {
  FramesStreaming run(1, 4, steps_of(12, 1), 12);
  run.run_pass();
  run.steps.push_back({3, 9, 11});
  run.streamer.define(12, run.steps.back());
  run.run_pass({0, 1, 2, 12, 3, 4, 12, 5, 6, 7, 8, 9, 10, 11});
  EXPECT_EQ(run.streamer.stats().unscheduled, 2U);
  EXPECT_GT(run.streamer.passes().back().misses, 0U);
  EXPECT_EQ(run.streamer.passes().back().unscheduled, 2U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, WhatOtherReadsTookIsLoadedAheadAgain) {
  FramesStreaming run(0, 4, steps_of(12, 1), 12);
  run.steps.push_back({8, 9, 10});
  run.streamer.define(12, run.steps.back());
  run.streamer.prefetch();
  run.streamer.begin_pass(kCaller);
  for (StepId id = 0; id < 3; ++id) run.run_one(id);
  run.run_one(12);  // where 4, 5 and 6 were
  for (StepId id = 3; id < 12; ++id) run.run_one(id);
  run.streamer.end_pass(kCaller);
  EXPECT_EQ(run.streamer.stats().misses, 3U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, StepMayStandAtThePlaceOfAnother) {
  FramesStreaming run(0, 4, steps_of(12, 1), 12);
  run.steps.push_back({5});
  run.streamer.define(12, run.steps.back());
  run.streamer.begin(12, 5, kCaller);
  run.look.look(*run.over, {5}, kCaller);
  run.streamer.end(12, kCaller);
  EXPECT_EQ(run.tier->fetches(), (Pages{5, 6, 7, 8, 9}));  // ahead of 5
  for (StepId id = 6; id < 12; ++id) run.run_one(id);
  EXPECT_EQ(run.streamer.stats().unscheduled, 0U);
  EXPECT_EQ(run.streamer.stats().misses, 1U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, WithoutAnOrderEveryStepIsDemanded) {
  FramesSetup setup(3, 6);
  Streaming run(setup.region, setup.bytes, steps_of(6, 2));
  run.streamer.follow({}, {});
  run.run_pass();
  run.streamer.prefetch();
  EXPECT_EQ(run.streamer.stats().unscheduled, 3U);
  EXPECT_EQ(run.streamer.stats().misses, 6U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, FollowsASecondOrder) {
  FramesStreaming run(1, 4, steps_of(12, 1), 12);
  run.run_pass();
  const std::vector<StepId> order = {0, 3, 1, 4, 3, 9};
  Steps pages;
  for (const StepId id : order) pages.push_back(run.steps[id]);
  run.streamer.follow(order, pages);
  for (int pass = 0; pass < 3; ++pass) {
    run.since();
    run.run_pass(order);
  }
  EXPECT_EQ(run.since().second, 0U);
  EXPECT_EQ(run.look.wrong(), 0);
  EXPECT_THROW(run.streamer.follow({0}, {}), std::invalid_argument);
  EXPECT_THROW(run.streamer.follow({0}, {{12}}), std::out_of_range);
  run.run_pass(order);  // the refused ones changed nothing
  EXPECT_EQ(run.since().second, 0U);
}

TEST(Streamer, NestedStepsKeepTheirPages) {
  FramesSetup setup(4, 9);
  Streaming run(setup.region, setup.bytes, {{0, 8}, {1}, {2}, {3, 4}, {5}});
  setup.region->arrange(arranged(9, 1, 3));
  // 0 around 1, 2 and 3; 5 alone.
  run.streamer.follow({0, 1, 2, 3, 4}, {{0, 8}, {0, 1, 8}, {0, 2, 8}, {0, 3, 4, 8}, {5}});
  const ReaderStream stream(setup);
  for (int pass = 0; pass < 5; ++pass) {
    run.streamer.begin_pass(stream.get());
    run.streamer.begin(0, stream.get());
    for (const StepId id : {1U, 2U, 3U}) run.run_one(id, stream.get(), microseconds(100));
    run.look.look(*run.over, run.steps[0], stream.get());
    run.streamer.end(0, stream.get());
    run.run_one(4, stream.get());
    run.streamer.end_pass(stream.get());
  }
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(run.look.wrong(), 0);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
}

TEST(Streamer, StepThatRunsInsideItselfEndsOnceForEachBegin) {
  FramesSetup setup(2, 2);
  Streaming run(setup.region, setup.bytes, {{0}, {1}});
  run.streamer.begin(0, kCaller);
  run.streamer.begin(0, kCaller);
  run.streamer.define(0, {1});  // what is begun ends as it began
  run.streamer.end(0, kCaller);
  EXPECT_EQ(setup.region->stats().pinned_pages, 1U);
  run.streamer.end(0, kCaller);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_THROW(run.streamer.end(0, kCaller), ScheduleError);
}

TEST(Streamer, StepsThatWereNotDefinedAreRefused) {
  FramesSetup setup(2, 2);
  Streamer streamer(setup.region);
  streamer.define(3, {0});
  EXPECT_THROW(streamer.begin(0, kCaller), ScheduleError);  // a number below one that is
  EXPECT_THROW(streamer.begin(4, kCaller), ScheduleError);
  EXPECT_THROW(streamer.end(3, kCaller), ScheduleError);
  EXPECT_THROW(streamer.define(1, {2}), std::out_of_range);
}

// ---- captures ----------------------------------------------------------------------------------

TEST(Streamer, CaptureLoadsWhatThePassNeedsAndNothingBeyondIt) {
  FramesStreaming run(2, 3, steps_of(9, 1), 9);
  run.run_pass();
  const ReaderStream stream(run);
  FramesRegion& region = *run.region;
  for (int capture = 0; capture < 2; ++capture) {
    region.prepare_capture();
    const std::size_t before = run.tier->fetches().size();
    run.streamer.set_capturing(true);
    region.begin_capture(stream.get());
    run.run_pass(stream.get());
    region.end_capture(stream.get());
    run.streamer.set_capturing(false);
    const Pages fetches = run.tier->fetches();
    EXPECT_EQ(Pages(fetches.begin() + static_cast<std::ptrdiff_t>(before), fetches.end()),
              (Pages{2, 3, 4, 5, 6, 7, 8}));
    run.spy->stream_synchronize(stream.get());
  }
  run.run_pass();
  EXPECT_EQ(run.look.wrong(), 0);
}

/// What a captured pass fetches by the time that each of its steps begins.
std::vector<Pages> fetched_by_step(FramesStreaming& run) {
  run.tier->together = true;
  run.region->prepare_capture();
  const ReaderStream stream(run);
  run.streamer.set_capturing(true);
  run.region->begin_capture(stream.get());
  std::size_t known = run.tier->fetches().size();
  std::vector<Pages> fetched;
  run.streamer.begin_pass(stream.get());
  for (StepId id = 0; id < run.steps.size(); ++id) {
    run.run_one(id, stream.get());
    const Pages fetches = run.tier->fetches();
    fetched.emplace_back(fetches.begin() + static_cast<std::ptrdiff_t>(known), fetches.end());
    known = fetches.size();
  }
  run.streamer.end_pass(stream.get());
  run.region->end_capture(stream.get());
  run.streamer.set_capturing(false);
  run.spy->stream_synchronize(stream.get());
  EXPECT_EQ(run.look.wrong(), 0);
  EXPECT_EQ(run.since().second, 0U);
  return fetched;
}

TEST(Streamer, CapturedCopiesBringWholeSteps) {
  // Copies are of 3 pages at most, half of the ring, or of one step: 1 + 2, 4, 1 + 2, ...
  FramesStreaming run(0, 7, {{0}, {1, 2}, {3, 4, 5, 6}, {7}, {8, 9}, {10, 11, 12, 13}}, 14);
  EXPECT_EQ(fetched_by_step(run),
            (std::vector<Pages>{
                pages_between(0, 7), {}, pages_between(7, 10), pages_between(10, 14), {}, {}}));
}

TEST(Streamer, CaptureHasACopyBehindTheOneThatAStepWaitsFor) {
  // Step 0 waits for the newest copy, and the ring has room for two pages behind it, not for three.
  FramesStreaming run(0, 5, steps_of(12, 3), 12);
  const std::vector<Pages> fetched = fetched_by_step(run);
  EXPECT_EQ(fetched.front(), pages_between(0, 5));
  Pages all;
  for (const Pages& pages : fetched) all.insert(all.end(), pages.begin(), pages.end());
  EXPECT_EQ(all, pages_between(0, 12));
}

// ---- steps of several threads ------------------------------------------------------------------

TEST(StreamerThreads, StepThatCannotFitBesideThoseOfItsOwnThreadIsRefusedAtOnce) {
  FramesSetup setup(3, 8);
  Streaming run(setup.region, setup.bytes, {{0, 1}, {2, 3}, {4, 5, 6, 7}});
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THROW(run.streamer.begin(2, kCaller), CapExceededError);  // never at all
  run.streamer.begin(0, kCaller);
  EXPECT_THROW(run.streamer.begin(1, kCaller), CapExceededError);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(2));
  run.streamer.end(0, kCaller);
  run.run_one(1);
}

TEST(StreamerThreads, EachEndsItsOwnStep) {
  FramesSetup setup(4, 4);
  const ReaderStream stream(setup);
  Streaming run(setup.region, setup.bytes, {{0}, {1}});
  run.streamer.begin(0, kCaller);
  Running other([&] {
    EXPECT_THROW(run.streamer.end(0, kCaller), ScheduleError);
    run.streamer.begin(0, stream.get());
    run.streamer.begin(1, stream.get());
    run.streamer.end(0, stream.get());
    EXPECT_THROW(run.streamer.end(0, stream.get()), ScheduleError);
    run.streamer.end(1, stream.get());
  });
  other.join();
  EXPECT_EQ(setup.region->stats().pinned_pages, 1U);
  run.streamer.end(0, kCaller);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
}

// ---- figures -----------------------------------------------------------------------------------

TEST(Streamer, StallIsThatOfTheStepWhosePagesAreLate) {
  FramesStreaming run(0, 4, steps_of(8, 1), 8);
  run.run_pass();
  const auto late = reinterpret_cast<std::uintptr_t>(run.region->address() + 5 * kPage);
  run.spy->on_copy = [&](std::uintptr_t target, std::size_t, StreamHandle stream) {
    if (target == late) run_on(stream, [] { std::this_thread::sleep_for(milliseconds(30)); });
  };
  run.run_pass();
  const std::vector<PassStats> passes = run.streamer.passes();
  ASSERT_EQ(passes.size(), 2U);
  const PassStats& pass = passes.back();
  EXPECT_EQ(pass.longest_stall_step, 5U);
  EXPECT_GT(pass.longest_stall_seconds, 0.01);  // part of it is over when the step begins
  EXPECT_GE(pass.stall_seconds, pass.longest_stall_seconds);
  EXPECT_GE(pass.seconds, pass.stall_seconds);
  EXPECT_EQ(pass.misses, 0U);
  EXPECT_EQ(pass.loaded_bytes, 8 * kPage);
  EXPECT_EQ(run.streamer.stats().passes, 2U);
  EXPECT_EQ(run.streamer.stats().steps, 16U);
}

TEST(Streamer, TraceHasASpanOfEveryStepLoadEvictionAndStall) {
  FramesStreaming run(1, 3, steps_of(6, 1), 6);
  EXPECT_TRUE(run.streamer.timeline().empty());
  run.run_pass();
  EXPECT_TRUE(run.streamer.timeline().empty());
  EXPECT_TRUE(run.streamer.step_seconds().empty());
  run.streamer.set_trace(true);
  run.since();
  run.streamer.begin_pass(kCaller);
  for (StepId id = 0; id < 6; ++id) {
    run.streamer.begin(id, kCaller);
    if (id == 2) std::this_thread::sleep_for(milliseconds(10));
    run.streamer.end(id, kCaller);
  }
  run.streamer.end_pass(kCaller);
  run.spy->stream_synchronize(run.region->copy_stream());
  std::multiset<SpanKind> kinds;
  std::set<std::uint32_t> loaded;
  double longest = 0;
  for (const Span& span : run.streamer.timeline()) {
    kinds.insert(span.kind);
    EXPECT_GE(span.start, 0);
    EXPECT_GE(span.seconds, 0);
    if (span.kind == SpanKind::kLoad) loaded.insert(span.id);
    if (span.kind == SpanKind::kStep && span.id == 2) longest = span.seconds;
  }
  const std::uint64_t loads = run.since().first;
  EXPECT_EQ(kinds.count(SpanKind::kPass), 1U);
  EXPECT_EQ(kinds.count(SpanKind::kStep), 6U);
  EXPECT_EQ(kinds.count(SpanKind::kStall), 6U);
  EXPECT_EQ(kinds.count(SpanKind::kLoad), loads);
  EXPECT_EQ(kinds.count(SpanKind::kEvict), loads);  // the ring was full
  EXPECT_GT(longest, 0.009);
  const std::vector<double> compute = run.streamer.step_seconds();
  ASSERT_EQ(compute.size(), 6U);
  EXPECT_EQ(std::max_element(compute.begin(), compute.end()) - compute.begin(), 2);
  run.streamer.set_trace(false);
}

TEST(Streamer, TimesOfStepsOnOtherStreamsAreReadWhenTheyAreOver) {
  Gate gate;
  FramesStreaming run(0, 4, steps_of(8, 1), 8);
  const ReaderStream slow(run);
  run.streamer.set_trace(true);
  run.streamer.begin_pass(kCaller);
  run_on(slow.get(), [&] { gate.wait(); });
  run.run_one(0, slow.get());
  run.streamer.end_pass(kCaller);
  EXPECT_TRUE(run.streamer.passes().empty());  // the pass is over, and that step is not
  EXPECT_TRUE(run.streamer.timeline().empty());
  gate.open();
  run.spy->stream_synchronize(slow.get());
  run.spy->stream_synchronize(run.region->copy_stream());
  EXPECT_EQ(run.streamer.passes().size(), 1U);
}

// ---- failures ----------------------------------------------------------------------------------

TEST(Streamer, FailureAheadIsToldByTheStepThatNeedsThePage) {
  FramesStreaming run(0, 3, steps_of(6, 1), 6);
  run.tier->on_fetch = [](PageIndex page) {
    if (page == 2) throw CheckpointError("cannot read", "weights", 0);
  };
  run.streamer.begin_pass(kCaller);
  EXPECT_NO_THROW(run.run_one(0));
  EXPECT_NO_THROW(run.run_one(1));
  EXPECT_THROW(run.streamer.begin(2, kCaller), CheckpointError);
  EXPECT_THROW(run.streamer.end(2, kCaller), ScheduleError);  // nothing was taken
  EXPECT_NO_THROW(run.run_one(3));
  EXPECT_EQ(run.region->stats().pinned_pages, 0U);
  EXPECT_GT(run.device->suppressed_count(), 0U);
  run.tier->on_fetch = nullptr;
  run.run_pass();
  run.run_pass();
  EXPECT_EQ(run.streamer.passes().back().misses, 0U);
  EXPECT_EQ(run.look.wrong(), 0);
}

TEST(Streamer, EveryCallFailsAndTheNextPassesWork) {
  std::uint64_t position = 0;
  for (bool fired = true; fired; ++position) {
    SCOPED_TRACE("call " + std::to_string(position) + " fails");
    FramesStreaming run(1, 3, steps_of(6, 1), 6);
    const ReaderStream stream(run);
    run.streamer.set_trace(true);
    run.device->fail_nth_call(position);
    bool told = false;
    for (int pass = 0; pass < 2; ++pass) {
      try {
        run.run_pass(stream.get());
        static_cast<void>(run.streamer.passes());
      } catch (const DeviceError&) {
        told = true;
      }
    }
    fired = run.device->fired();
    if (fired) {
      EXPECT_TRUE(told || run.device->suppressed_count() > 0) << "a failure vanished";
    }
    run.device->reset();
    EXPECT_EQ(run.region->stats().pinned_pages, 0U);
    for (int pass = 0; pass < 3; ++pass) EXPECT_NO_THROW(run.run_pass(stream.get()));
    run.since();
    run.run_pass(stream.get());
    EXPECT_EQ(run.since(), std::pair(std::uint64_t{4}, std::uint64_t{0}));
    run.spy->stream_synchronize(stream.get());
    EXPECT_EQ(run.look.wrong(), 0);
    if (HasFailure()) return;
  }
  EXPECT_GT(position, 100U);
}

TEST(Streamer, StepsLeftOpenEndWithTheStreamer) {
  FramesSetup setup(2, 4);
  {
    Streaming run(setup.region, setup.bytes, steps_of(4, 1));
    run.streamer.begin(0, kCaller);
    run.streamer.begin(1, kCaller);
  }
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_NO_THROW(setup.region->arrange(arranged(4, 0, 2)));
}

TEST(Streamer, StreamerThatTakesTheRegionOverIsTheOneThatIsTold) {
  FramesSetup setup(2, 4);
  auto before = std::make_unique<Streamer>(setup.region);
  Streaming run(setup.region, setup.bytes, steps_of(4, 1));
  before.reset();
  run.run_pass();
  EXPECT_EQ(run.streamer.stats().loaded_bytes, setup.region->frames_stats().loaded_bytes);
  EXPECT_GT(run.streamer.stats().misses, 0U);
}

// ---- over unified memory -----------------------------------------------------------------------

TEST(StreamerManaged, ReadsRightBytesUnderTheCapInEveryOrder) {
  PagerSetup setup(6);
  setup.device->delay_calls_of("managed_prefetch", microseconds(100));
  const auto region = setup.reserve(16);
  const Bytes bytes = fill(*region, 3);
  const OwnedStream stream(setup.spy);
  {
    Streaming run(region, bytes, steps_of(16, 2));
    run.streamer.set_trace(true);
    for (int pass = 0; pass < 4; ++pass) {
      run.run_pass(stream.get(), microseconds(100));
      run.run_pass();
      run.run_pass({0, 1, 4, 4, 2}, stream.get());
      static_cast<void>(run.streamer.timeline());
    }
    setup.spy->stream_synchronize(stream.get());
    EXPECT_EQ(run.look.wrong(), 0);
    EXPECT_EQ(run.streamer.stats().passes, 12U);
    EXPECT_GT(run.streamer.stats().loaded_bytes, 16 * kPage);
  }
  EXPECT_LE(setup.spy->peak(), 6 * kPage);
  EXPECT_EQ(setup.pager->region_stats(*region).pinned_pages, 0U);
}

TEST(StreamerManaged, LoadsAheadAreTheRunsBetweenWhatStays) {
  constexpr PageIndex kPages = 120;
  constexpr std::size_t kBatch = 8;
  Pages staying;
  std::map<std::size_t, std::size_t> runs;  // of the others, by their first page
  for (PageIndex page = 0; page < kPages; page += 2) {
    const std::size_t run = kBatch - 1 + runs.size() % 3;  // a batch, one less, one more
    runs.emplace(page, run);
    page += static_cast<PageIndex>(run);
    staying.insert(staying.end(), {page, page + 1});
  }
  ASSERT_EQ(staying.back(), kPages - 1);
  Steps steps = steps_of(kPages, 1);
  for (std::size_t step = 10; step < steps.size(); step += 7) {
    steps[step].insert(steps[step].begin(), staying.front());  // as small tensors lie together
  }
  PagerSetup setup(staying.size() + ManagedPager::kBatchesInRing * kBatch);
  std::vector<std::pair<std::size_t, std::size_t>> loads;  // first page, count; by the load thread
  const auto region = setup.reserve(kPages);
  setup.spy->on_prefetch = [&](std::uintptr_t address, std::size_t nbytes, StreamHandle) {
    const auto start = reinterpret_cast<std::uintptr_t>(region->address());
    loads.emplace_back((address - start) / kPage, nbytes / kPage);
  };
  const Bytes bytes = fill(*region, 1);
  region->keep(staying);
  Streaming streaming(region, bytes, steps);
  ASSERT_EQ(region->ahead_batch(), kBatch);
  for (int pass = 0; pass < 2; ++pass) streaming.run_pass();
  setup.pager->synchronize();
  loads.clear();
  streaming.since();
  for (int pass = 0; pass < 3; ++pass) streaming.run_pass();
  setup.pager->synchronize();
  EXPECT_EQ(streaming.since(),
            (std::pair<std::uint64_t, std::uint64_t>{3 * (kPages - staying.size()), 0}));
  EXPECT_EQ(loads.size(), 3 * runs.size());
  for (const auto& [first, count] : loads) EXPECT_EQ(runs[first], count) << first;
}

TEST(StreamerManaged, TraceHasWhatWasDropped) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  const Bytes bytes = fill(*region, 3);
  Streaming run(region, bytes, steps_of(8, 1));
  run.streamer.set_trace(true);
  run.run_pass();
  setup.pager->synchronize();
  std::set<std::uint32_t> dropped;
  for (const Span& span : run.streamer.timeline()) {
    if (span.kind != SpanKind::kEvict) continue;
    EXPECT_GE(span.start, 0);
    EXPECT_GE(span.seconds, 0);  // how long is up to when the stream's thread runs
    for (std::uint32_t i = 0; i < span.count; ++i) dropped.insert(span.id + i);
  }
  EXPECT_GE(dropped.size(), 4U);  // of eight pages there is room for four
}

TEST(StreamerManaged, StreamerCanGoWhileThePagerLoads) {
  PagerSetup setup(8);
  setup.device->delay_calls_of("managed_prefetch", microseconds(300));
  const auto region = setup.reserve(16);
  const Bytes bytes = fill(*region, 3);
  for (int round = 0; round < 20; ++round) {
    Streaming run(region, bytes, steps_of(16, 1));
    run.run_one(static_cast<StepId>(round % 16));
    run.streamer.prefetch();
  }
  EXPECT_NO_THROW(setup.pager->synchronize());
}

}  // namespace
}  // namespace penstock
