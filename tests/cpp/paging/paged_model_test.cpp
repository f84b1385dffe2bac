// A paged model on the host device: which steps operations are, where passes begin and end, what is
// expected of them, what is held, and what is kept of what they write.
#include "paging/paged_model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "managed/page_table.hpp"
#include "planner/planner.hpp"
#include "support/paged_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using Steps = std::vector<StepId>;

/// Notes how passes ended.
struct Ends {
  explicit Ends(PagedModel& model) {
    model.on_pass([this](const PassEnd& end) { all.push_back(end); });
  }
  std::vector<PassEnd> all;
};

// ---- steps -------------------------------------------------------------------------------------

TEST(PagedModel, StepsAreToldByTheirOperationAndTheBytesOfItsTensors) {
  PagedSetup setup(8, 8);
  const StepId step = setup.run(operation(kMm), Pages{0, 1});
  EXPECT_EQ(setup.run(operation(kMm), Pages{0, 1}), step);
  EXPECT_NE(setup.run(operation(kAdd), Pages{0, 1}), step);
  EXPECT_NE(setup.run(operation(kMm), Pages{1, 0}), step);
  EXPECT_NE(setup.run(operation(kMm), Pages{0}), step);
  EXPECT_NE(setup.run(operation(kMm), Pages{0, 1, 2}), step);
  EXPECT_NE(setup.run(operation(kMm), {setup.range(0, 2 * kPage)}), step);
  EXPECT_EQ(setup.run(operation(kMm), Pages{0, 1}), step);
  EXPECT_EQ(setup.model->pages(step), (Pages{0, 1}));
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
}

TEST(PagedModel, PagesOfAStepAreThoseThatItsBytesTouch) {
  PagedSetup setup(8, 8);
  const auto pages = [&](const std::vector<PagingRange>& ranges) {
    return setup.model->pages(setup.run(operation(kMm), ranges));
  };
  EXPECT_EQ(pages(setup.ranges({7, 2, 7, 3})), (Pages{2, 3, 7}));
  EXPECT_EQ(pages({setup.range(kPage, kPage)}), Pages{1});
  EXPECT_EQ(pages({setup.range(kPage - 1, 2)}), (Pages{0, 1}));
  EXPECT_EQ(pages({setup.range(8 * kPage - 1, 1)}), Pages{7});
  EXPECT_EQ(pages({setup.range(3 * kPage + 9, kPage), setup.range(5, 10)}), (Pages{0, 3, 4}));
}

TEST(PagedModel, DescribesItsStepsByOperationAndTensors) {
  PagedSetup setup(8, 6,
                   {{100, kPage, kPage, "embed"},
                    {kPage + 200, 3 * kPage, kPage, "experts"},
                    {5 * kPage, 50, 50, "norm"}});
  const StepId one = setup.run(operation(kMm), {setup.range(100, 8)});
  EXPECT_EQ(setup.model->describe(one), "aten::mm embed");
  const StepId two =
      setup.run(operation(kAdd), {setup.range(2 * kPage, 8), setup.range(5 * kPage, 50)});
  EXPECT_EQ(setup.model->tensors(two), (std::vector<std::string>{"experts", "norm"}));
  EXPECT_EQ(setup.model->describe(two), "aten::add experts and 1 more");
  EXPECT_EQ(setup.model->describe(0), "weights embed");
}

TEST(PagedModel, HoldsPagesBetweenBeginAndEndOnly) {
  PagedSetup setup(4, 8);
  const auto all = setup.ranges({1, 2});
  const PagedModel::Hold held = setup.model->begin(operation(kMm), all.data(), all.size());
  EXPECT_EQ(setup.region->stats().pinned_pages, 2U);
  setup.model->end(held, operation(kMm), all.data(), all.size());
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_THROW(setup.model->end(held, operation(kMm), all.data(), all.size()), ScheduleError);
  const PagedModel::Hold kernel = setup.hold("a kernel", {3, 5});
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 3));
  EXPECT_TRUE(right_now(*setup.region, setup.bytes, 5));
  EXPECT_EQ(setup.region->stats().pinned_pages, 2U);
  setup.model->let_go(kernel, kCaller);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_EQ(setup.model->describe(kernel.step), "a kernel w3 and 1 more");
}

TEST(PagedModel, NothingMayBeHeld) {
  PagedSetup setup(4, 8);
  setup.model->let_go(setup.hold("a kernel", {}), kCaller);
  setup.run(operation(kMm), Pages{});
}

TEST(PagedModel, PagesThatStayAreHeldWithoutTheStreamer) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 2, 2));
  setup.call(pages_between(0, 8));
  setup.call(pages_between(0, 8));
  const auto steps = setup.streamer->stats().steps;
  setup.run_each({0, 1, 0, 1});
  EXPECT_EQ(setup.streamer->stats().steps, steps);
  setup.run_each({2});
  EXPECT_EQ(setup.streamer->stats().steps, steps + 1);
  const auto all = setup.ranges({0, 1});
  const PagedModel::Hold held = setup.model->begin(operation(kMm), all.data(), all.size());
  EXPECT_TRUE(held.in_place);
  EXPECT_EQ(setup.region->stats().pinned_pages, 2U);
  EXPECT_EQ(setup.region->evict({0, 1}), 0U);
  setup.model->end(held, operation(kMm), all.data(), all.size());
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  setup.streamer->set_trace(true);  // every step has its span
  const PagedModel::Hold traced = setup.model->begin(operation(kMm), all.data(), all.size());
  EXPECT_FALSE(traced.in_place);
  setup.model->end(traced, operation(kMm), all.data(), all.size());
  setup.streamer->set_trace(false);
}

TEST(PagedModel, StepWithoutRoomWaitsForPagesThatAnotherThreadHoldsInPlace) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 3, 1));
  setup.run_each({0, 1, 2});
  setup.run_each({0, 1, 2});
  const auto all = setup.ranges({0, 1, 2});
  const PagedModel::Hold held = setup.model->begin(operation(kMm), all.data(), all.size());
  ASSERT_TRUE(held.in_place);
  Running other([&] { setup.run(operation(kAdd), Pages{3, 4}); });
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_FALSE(other.ended());
  setup.model->end(held, operation(kMm), all.data(), all.size());
  EXPECT_NO_THROW(other.join());
}

// ---- the guess ---------------------------------------------------------------------------------

TEST(PagedModel, ExpectsTensorsAndTheirSlicesAsTheyLieBeforeAnythingIsKnown) {
  PagedSetup setup(4, 9,
                   {{0, 2 * kPage, 2 * kPage, "embed"},
                    {2 * kPage, 4 * kPage, kPage, "experts"},
                    {6 * kPage, 0, 0, "empty"},
                    {6 * kPage, 3 * kPage - 5, 2 * kPage, "head"}});
  const Steps expected = setup.model->expected();
  std::vector<Pages> pages;
  for (const StepId step : expected) pages.push_back(setup.model->pages(step));
  EXPECT_EQ(pages, (std::vector<Pages>{{0, 1}, {2}, {3}, {4}, {5}, {6, 7}, {8}}));
}

TEST(PagedModel, GuessIsLoadedAheadAndIsNotAMiss) {
  PagedSetup setup(4, 12);
  setup.region->arrange(arranged(12, 0, 4));
  setup.model->begin_call();
  setup.run_each({0});
  EXPECT_EQ(setup.tier->fetches(), (Pages{0, 1, 2, 3, 4}));
  setup.run_each({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11});
  setup.model->end_call(kCaller, false, true);
  EXPECT_EQ(setup.streamer->stats().unscheduled, 0U);
  EXPECT_EQ(setup.streamer->stats().misses, 1U);  // the first of all
}

TEST(PagedModel, OperationStandsAtTheGuessOfItsLargestRange) {
  PagedSetup setup(4, 12, {{0, 100, 100, "bias"}, {4 * kPage, 6 * kPage, kPage, "experts"}});
  setup.region->arrange(arranged(12, 1, 3));
  setup.model->begin_call();
  setup.run(operation(kMm), {setup.range(0, 100), setup.range(6 * kPage, kPage)});
  EXPECT_EQ(setup.tier->fetches(), (Pages{0, 6, 7, 8, 9}));
  EXPECT_EQ(setup.streamer->stats().unscheduled, 0U);
}

TEST(PagedModel, WhatIsNotGuessedIsDemandedAndMovesTheGuessNowhere) {
  PagedSetup setup(4, 12,
                   {{0, 4 * kPage, kPage, "weights"}, {4 * kPage, 8 * kPage, 0, "gradients"}});
  EXPECT_EQ(setup.model->expected().size(), 4U);
  setup.region->arrange(arranged(12, 1, 3));
  setup.model->begin_call();
  setup.run(operation(kMm), Pages{9});
  EXPECT_EQ(setup.tier->fetches(), (Pages{9, 0, 1, 2, 3}));  // the weights from the first on
  setup.run(operation(kMm), Pages{0});
  EXPECT_EQ(setup.streamer->stats().unscheduled, 1U);
}

// ---- passes ------------------------------------------------------------------------------------

TEST(PagedModel, CallsOfTheModelAreItsPasses) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 1, 3));
  Ends ends(*setup.model);
  const Steps steps = setup.call(pages_between(0, 8));
  ASSERT_EQ(ends.all.size(), 1U);
  EXPECT_EQ(ends.all[0].first, steps.front());
  EXPECT_TRUE(ends.all[0].changed);
  EXPECT_EQ(setup.model->order(steps.front()), steps);
  EXPECT_EQ(setup.model->expected(), steps);
  EXPECT_TRUE(setup.model->order(steps.back()).empty());
  EXPECT_EQ(setup.call(pages_between(0, 8)), steps);
  ASSERT_EQ(ends.all.size(), 2U);
  EXPECT_FALSE(ends.all[1].changed);
  EXPECT_EQ(setup.streamer->stats().passes, 2U);
  // The first step may come within a call as often as it will.
  setup.call({0, 1, 0, 2, 0});
  EXPECT_EQ(ends.all.size(), 3U);
}

TEST(PagedModel, TellsWhetherACallIsUnderWay) {
  PagedSetup setup(4, 4);
  EXPECT_FALSE(setup.model->in_call());
  setup.model->begin_call();
  EXPECT_TRUE(setup.model->in_call());
  setup.run_each({0});
  EXPECT_TRUE(setup.model->in_call());
  setup.model->end_call(kCaller, false, false);
  EXPECT_FALSE(setup.model->in_call());
  setup.run_each({1});
  EXPECT_FALSE(setup.model->in_call());
}

TEST(PagedModel, ExpectedOrderIsFollowedWithoutMisses) {
  PagedSetup setup(6, 12);
  setup.region->arrange(arranged(12, 2, 4));
  const Pages order = {0, 5, 3, 11, 4, 9, 10, 1, 8, 7, 6, 2};
  for (int pass = 0; pass < 3; ++pass) setup.call(order);
  setup.since();
  for (int pass = 0; pass < 3; ++pass) {
    setup.call(order);
    const auto [loads, misses] = setup.since();
    EXPECT_LE(loads, 12U);
    EXPECT_EQ(misses, 0U);
  }
  EXPECT_EQ(setup.streamer->passes().back().unscheduled, 0U);
}

TEST(PagedModel, WithoutCallsAPassBeginsWhereTheFirstStepComesAgain) {
  PagedSetup setup(4, 6);
  setup.region->arrange(arranged(6, 1, 3));
  Ends ends(*setup.model);
  const Steps steps = setup.run_each({0, 1, 2, 1, 3, 4, 5});
  EXPECT_TRUE(ends.all.empty());
  setup.run_each({0});
  ASSERT_EQ(ends.all.size(), 1U);
  EXPECT_TRUE(ends.all[0].changed);
  EXPECT_EQ(setup.model->order(steps.front()), steps);
  setup.run_each({1, 2, 1, 3, 4, 5, 0, 1, 2, 1, 3, 4, 5});
  setup.since();
  setup.run_each({0, 1, 2, 1, 3, 4, 5});
  EXPECT_EQ(setup.since().second, 0U);
  EXPECT_EQ(ends.all.size(), 3U);
  EXPECT_FALSE(ends.all[2].changed);
}

TEST(PagedModel, PassThatACallCutsShortIsNotLearnedFrom) {
  PagedSetup setup(6, 6);
  Ends ends(*setup.model);
  const Steps alone = setup.run_each({3, 4});
  const Steps steps = setup.call({0, 1, 2});
  ASSERT_EQ(ends.all.size(), 1U);
  EXPECT_EQ(ends.all[0].first, steps.front());
  EXPECT_TRUE(setup.model->order(alone.front()).empty());
}

TEST(PagedModel, PassThatGoesRoundWithoutItsFirstStepBeginsAnewAndIsNotLearnedFrom) {
  PagedSetup setup(6, 6);
  Ends ends(*setup.model);
  const StepId first = setup.run_each({0}).front();
  for (int round = 0; round < 400; ++round) setup.run_each({1, 2, 3});
  EXPECT_GT(setup.streamer->stats().passes, 1U);
  EXPECT_TRUE(setup.model->order(first).empty());
  EXPECT_FALSE(ends.all.empty());  // from then on there are passes of three steps
  const StepId last = ends.all.back().first;
  EXPECT_EQ(setup.model->order(last).size(), 3U);
}

TEST(PagedModel, BackwardPassAndWhatFollowsBelongToTheCallBefore) {
  PagedSetup setup(4, 6);
  setup.region->arrange(arranged(6, 1, 3));
  Ends ends(*setup.model);
  Steps steps;
  for (int round = 0; round < 4; ++round) {
    steps = setup.call(pages_between(0, 6), false);
    Running autograd([&] {
      for (PageIndex page = 6; page-- > 0;) {
        steps.push_back(setup.run(operation(kAdd, kCaller, true), Pages{page}));
      }
    });
    autograd.join();
    steps.push_back(setup.run(operation(kCopy), Pages{0, 1}));  // an optimizer
    EXPECT_EQ(ends.all.size(), static_cast<std::size_t>(round));
  }
  setup.model->begin_call();
  EXPECT_EQ(ends.all.size(), 3U);
  setup.run_each({0});
  EXPECT_EQ(ends.all.size(), 4U);
  EXPECT_EQ(steps.size(), 13U);
  EXPECT_EQ(setup.model->order(steps.front()), steps);
  EXPECT_TRUE(ends.all[0].changed);
  EXPECT_FALSE(ends.all[3].changed);
  EXPECT_EQ(setup.streamer->stats().unscheduled, 0U);  // another thread's, and none unforeseen
}

TEST(PagedModel, KindsOfPassesHaveTheirOwnOrder) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 1, 3));
  Steps prefill;
  Steps decode;
  for (int round = 0; round < 3; ++round) {
    prefill = setup.call({0, 1, 2, 3, 4, 5});
    setup.model->begin_call();
    decode = {setup.run(operation(kAdd), Pages{7})};
    EXPECT_EQ(setup.model->expected(), round == 0 ? prefill : setup.model->order(decode.front()));
    for (const StepId step : setup.run_each({6, 5, 4})) decode.push_back(step);
    setup.model->end_call(kCaller, false, true);
    EXPECT_EQ(setup.model->expected(), decode);
  }
  EXPECT_EQ(setup.model->order(prefill.front()), prefill);
  EXPECT_EQ(setup.model->order(decode.front()), decode);
}

TEST(PagedModel, FailedCallIsNotLearnedFrom) {
  PagedSetup setup(4, 8);
  Ends ends(*setup.model);
  setup.model->begin_call();
  const StepId first = setup.run_each({0, 1, 2}).front();
  setup.model->end_call(kCaller, true, true);
  EXPECT_TRUE(ends.all.empty());
  EXPECT_TRUE(setup.model->order(first).empty());
  const Steps steps = setup.call(pages_between(0, 8));
  setup.model->begin_call();
  setup.run_each({0, 1});
  setup.model->end_call(kCaller, true, true);
  EXPECT_EQ(setup.model->order(first), steps);
  EXPECT_EQ(ends.all.size(), 1U);
  setup.call(pages_between(0, 8));
  EXPECT_EQ(ends.all.size(), 2U);
  EXPECT_FALSE(ends.all[1].changed);
}

TEST(PagedModel, CallThatReadsNothingIsNoPass) {
  PagedSetup setup(4, 8);
  Ends ends(*setup.model);
  setup.model->begin_call();
  setup.model->end_call(kCaller, false, true);
  EXPECT_TRUE(ends.all.empty());
  EXPECT_EQ(setup.streamer->stats().passes, 0U);
  EXPECT_FALSE(setup.model->in_call());
}

TEST(PagedModel, CallThatReadsNothingTakesNothingFromThePassBefore) {
  PagedSetup setup(4, 8);
  Ends ends(*setup.model);
  const Steps steps = setup.call({0, 1, 2}, false);
  setup.model->begin_call();
  setup.model->end_call(kCaller, false, true);
  setup.call({4, 5}, false);
  EXPECT_EQ(setup.model->order(steps.front()), steps);
}

TEST(PagedModel, StepsOfOtherThreadsAreUnforeseenButRight) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 0, 4));
  const Steps steps = setup.call(pages_between(0, 8));
  const auto before = setup.streamer->stats().unscheduled;
  setup.model->begin_call();
  setup.run_each({0, 1, 2});
  Running other([&] {
    setup.model->begin_call();  // beside that of the main thread
    setup.run_each({7, 6, 0});
    setup.model->end_call(kCaller, false, true);
  });
  other.join();
  EXPECT_EQ(setup.streamer->stats().unscheduled, before + 3);
  setup.run_each({3, 4, 5, 6, 7});
  setup.model->end_call(kCaller, false, true);
  EXPECT_EQ(setup.model->order(steps.front()), steps);
}

TEST(PagedModel, AnotherThreadGoesOnWhereTheOneOfThePassHasGone) {
  PagedSetup setup(6, 6);
  Running gone([&] { setup.run_each({0, 1}); });
  gone.join();
  const Steps steps = setup.run_each({2, 3, 4});
  for (int round = 0; round < 1500; ++round) setup.run_each({2, 3, 4});
  EXPECT_EQ(setup.model->expected().size(), 3U);
  const auto before = setup.streamer->stats().unscheduled;
  setup.run_each({2, 3, 4, 2, 3, 4});
  EXPECT_EQ(setup.streamer->stats().unscheduled, before);
}

TEST(PagedModel, ManyThreadsReadRightBytes) {
  PagedSetup setup(6, 16);
  setup.region->arrange(arranged(16, 2, 4));
  std::atomic<int> passes{0};
  setup.model->on_pass([&](const PassEnd& end) {
    if (!setup.model->order(end.first).empty()) ++passes;
  });
  std::vector<std::unique_ptr<Running>> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.push_back(std::make_unique<Running>([&setup, seed] {
      std::mt19937 random(seed);
      for (int round = 0; round < 30; ++round) {
        const bool called = random() % 2 == 0;
        if (called) setup.model->begin_call();
        for (int i = 0; i < 12; ++i) {
          const auto page = static_cast<PageIndex>(random() % 15);
          setup.run(operation(random() % 2 == 0 ? kMm : kAdd, kCaller, random() % 8 == 0),
                    Pages{page, page + 1});
        }
        if (called) setup.model->end_call(kCaller, random() % 8 == 0, random() % 2 == 0);
      }
    }));
  }
  for (const auto& thread : threads) EXPECT_NO_THROW(thread->join());
  EXPECT_GT(passes, 0);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
}

// ---- bytes of a pass ---------------------------------------------------------------------------

TEST(PagedModel, SteadyPassesLoadWhatThePlannerHasAsTheLeast) {
  std::mt19937 random(3);
  for (const std::size_t frames : {4U, 7U, 11U}) {
    PagedSetup setup(frames, 16);
    std::vector<Pages> reads;
    for (int i = 0; i < 20; ++i) {
      const auto page = static_cast<PageIndex>(random() % 15);
      reads.push_back(i % 3 == 0 ? Pages{page, page + 1} : Pages{page});
    }
    const auto call = [&] {
      setup.model->begin_call();
      for (const Pages& pages : reads) setup.run(operation(kMm), pages);
      setup.model->end_call(kCaller, false, true);
    };
    bool arranged_now = false;
    Plan plan;
    setup.model->on_pass([&](const PassEnd& end) {
      if (!end.changed) return;
      PlanRequest request;
      request.page_count = 16;
      request.page_size = kPage;
      for (const StepId step : setup.model->order(end.first)) {
        request.steps.push_back(setup.model->pages(step));
      }
      request.frames = frames;
      request.link_rate = 50e9;
      plan = make_plan(request);
      setup.region->arrange({plan.slot, plan.ring});
      arranged_now = true;
    });
    for (int pass = 0; pass < 4; ++pass) call();
    EXPECT_TRUE(arranged_now);
    setup.since();
    for (int pass = 0; pass < 5; ++pass) {
      call();
      EXPECT_EQ(setup.since(), (std::pair<std::uint64_t, std::uint64_t>{plan.loads.size(), 0}))
          << frames << " frames";
    }
    EXPECT_EQ(setup.streamer->passes().back().loaded_bytes, plan.bytes_per_pass);
  }
}

// ---- writes ------------------------------------------------------------------------------------

TEST(PagedModel, WritesOutliveEviction) {
  PagedSetup setup(2, 6);
  for (PageIndex page = 0; page < 6; ++page) {
    setup.write(page, static_cast<std::uint8_t>(page + 1));
  }
  EXPECT_GT(setup.region->frames_stats().written_back_bytes, 0U);
  setup.run_each({0, 1, 2, 3, 4, 5});
  setup.region->evict(pages_between(0, 6));
  EXPECT_TRUE(setup.tier->bytes() == setup.bytes);
  setup.run_each({5, 4, 3});
}

TEST(PagedModel, OnlyPagesOfWrittenRangesAreCopiedBack) {
  PagedSetup setup(4, 4);
  const std::vector<PagingRange> all = {setup.range(0, kPage), setup.range(kPage, 8, true)};
  setup.run(operation(kAdd), all);
  setup.region->evict(pages_between(0, 4));
  EXPECT_EQ(setup.region->frames_stats().written_back_bytes, kPage);
}

TEST(PagedModel, WriteThatCouldNotBeKeptIsRefusedBeforeAnythingIsHeld) {
  PagedSetup setup(4, 4);
  setup.tier->writable = false;
  const std::vector<PagingRange> all = {setup.range(0, kPage), setup.range(kPage, 8, true)};
  try {
    setup.model->begin(operation(kCopy), all.data(), all.size());
    FAIL() << "nobody would keep that";
  } catch (const ModelError& error) {
    EXPECT_NE(std::string(error.what()).find("pinned"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(setup.tier->fetches().empty());
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_EQ(setup.used_pages(), 0U);
  EXPECT_EQ(setup.streamer->stats().steps, 0U);
  setup.run(operation(kMm), Pages{0, 1});
}

TEST(PagedModel, PagesAreLetGoOfWhereAWriteCannotBeNoted) {
  PagedSetup setup(4, 4);
  const std::vector<PagingRange> all = {setup.range(0, 8, true), setup.range(kPage, 8, true)};
  const PagedModel::Hold held = setup.model->begin(operation(kCopy), all.data(), all.size());
  setup.tier->writable = false;
  EXPECT_THROW(setup.model->end(held, operation(kCopy), all.data(), all.size()), ModelError);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
}

// ---- messages and figures ----------------------------------------------------------------------

TEST(PagedModel, RefusalNamesModelOperationTensorsAndBytes) {
  PagedSetup setup(2, 6);
  const auto all = setup.ranges({1, 2, 4});
  try {
    setup.model->begin(operation(kMm), all.data(), all.size());
    FAIL() << "3 pages do not fit on 2 frames";
  } catch (const CapExceededError& error) {
    const std::string message = error.what();
    for (const char* part : {"model 'llm'", "aten::mm", "w1 and 2 more", "192.00 KiB", "Raise"}) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " is not in: " << message;
    }
    EXPECT_EQ(error.cap, 2 * kPage);
    EXPECT_EQ(error.requested, kPage);
  }
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  try {
    setup.hold("my kernel", {1, 2, 4});
    FAIL() << "3 pages do not fit on 2 frames";
  } catch (const CapExceededError& error) {
    EXPECT_NE(std::string(error.what()).find("my kernel"), std::string::npos) << error.what();
  }
  setup.run_each({1, 2, 4});
}

TEST(PagedModel, PartsOfListsHaveAnEighthOfTheRoomByWholePages) {
  PagedSetup setup(4, 24);
  const auto part_bytes = [&](const std::vector<PagingRange>& ranges) {
    return setup.model->part_bytes(ranges.data(), ranges.size());
  };
  constexpr std::size_t kWhole = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(part_bytes(setup.ranges(pages_between(0, 24))), kWhole);  // nobody has said how much
  setup.model->set_room(16 * kPage);
  EXPECT_EQ(part_bytes({}), kWhole);
  EXPECT_EQ(part_bytes(setup.ranges(pages_between(0, 8))), kWhole);
  EXPECT_EQ(part_bytes(setup.ranges(pages_between(0, 9))), 2 * kPage);
  EXPECT_EQ(part_bytes({setup.range(5, 8 * kPage)}), 2 * kPage * 8 / 9);
  std::vector<PagingRange> small;  // one on each page
  for (std::size_t page = 0; page < 10; ++page) small.push_back(setup.range(page * kPage, 8));
  EXPECT_EQ(part_bytes(small), 2 * 8U);
  small.resize(8);
  EXPECT_EQ(part_bytes(small), kWhole);
  setup.model->set_room(4 * kPage);
  EXPECT_EQ(part_bytes(setup.ranges({0, 1, 2})), kPage / 2);
}

// ---- handlers ----------------------------------------------------------------------------------

TEST(PagedModel, NextUseIsToldOnceBeforeAnythingIsLoaded) {
  PagedSetup setup(4, 4);
  int told = 0;
  setup.model->on_next_use([&] {
    ++told;
    EXPECT_EQ(setup.used_pages(), 0U);
    setup.region->arrange(arranged(4, 2, 1));  // as whoever arranges the model does
    setup.model->let_go(setup.hold("inside", {3}), kCaller);
  });
  EXPECT_EQ(told, 0);
  setup.run_each({0, 1});
  EXPECT_EQ(told, 1);
  EXPECT_EQ(setup.region->frame_count(), 3U);
  setup.model->on_next_use([&] { ++told; });
  setup.model->let_go(setup.hold("a kernel", {1}), kCaller);
  setup.run_each({0});
  EXPECT_EQ(told, 2);
  setup.model->on_next_use([&] { ++told; });
  setup.model->on_next_use(nullptr);
  setup.run_each({0});
  EXPECT_EQ(told, 2);
}

TEST(PagedModel, NextUseIsToldOnceHoweverManyThreadsCome) {
  PagedSetup setup(8, 8);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> told{0};
    setup.model->on_next_use([&] { ++told; });
    std::vector<std::unique_ptr<Running>> threads;
    for (PageIndex page = 0; page < 4; ++page) {
      threads.push_back(std::make_unique<Running>([&setup, page] { setup.run_each({page}); }));
    }
    for (const auto& thread : threads) thread->join();
    EXPECT_EQ(told, 1);
  }
}

TEST(PagedModel, EndOfAPassIsToldWithNoLockHeld) {
  PagedSetup setup(4, 4);
  int told = 0;
  setup.model->on_pass([&](const PassEnd& end) {
    ++told;
    EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
    EXPECT_FALSE(setup.model->describe(setup.model->expected().front()).empty());
    setup.region->arrange(arranged(4, 1, static_cast<std::size_t>(1 + told % 2)));
    Running other([&] { EXPECT_FALSE(setup.model->order(end.first).empty()); });
    other.join();
    setup.model->on_pass(nullptr);
  });
  setup.call({0, 1, 2});
  setup.call({0, 1, 2});
  EXPECT_EQ(told, 1);
  setup.model->on_pass([&](const PassEnd&) { ++told; });
  setup.run_each({0, 1, 0, 1});
  EXPECT_EQ(told, 2);
}

// ---- captures ----------------------------------------------------------------------------------

TEST(PagedModel, StreamThatSomebodyElseCapturesIsRefused) {
  PagedSetup setup(4, 4);
  const ReaderStream stream(setup);
  setup.spy->captured_stream = stream.get().value;
  const auto all = setup.ranges({0});
  try {
    setup.model->begin(operation(kMm, stream.get()), all.data(), all.size());
    FAIL() << "the copies would not be in that graph";
  } catch (const ScheduleError& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("\"llm\""), std::string::npos) << message;
    EXPECT_NE(message.find("MemoryManager.capture"), std::string::npos) << message;
  }
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  EXPECT_TRUE(setup.tier->fetches().empty());
  setup.run_each({0});  // on another stream
  setup.spy->captured_stream = nullptr;
  setup.run(operation(kMm, stream.get()), Pages{1});
}

TEST(PagedModel, CapturedPassIsFollowedAndNotLearnedFrom) {
  PagedSetup setup(4, 8);
  setup.region->arrange(arranged(8, 0, 4));
  const Steps steps = setup.call(pages_between(0, 8));
  setup.call(pages_between(0, 8));
  Ends ends(*setup.model);
  const ReaderStream stream(setup);
  setup.region->prepare_capture();
  setup.model->set_capturing(true);
  setup.region->begin_capture(stream.get());
  setup.spy->captured_stream = stream.get().value;
  EXPECT_TRUE(setup.model->in_call());
  setup.since();
  setup.model->begin_call();
  for (PageIndex page = 0; page < 8; ++page) {
    setup.run(operation(kMm, stream.get()), Pages{page});
  }
  setup.model->end_call(stream.get(), false, true);
  EXPECT_EQ(setup.since(), (std::pair<std::uint64_t, std::uint64_t>{8, 0}));
  setup.region->end_capture(stream.get());
  setup.spy->captured_stream = nullptr;
  setup.model->set_capturing(false);
  EXPECT_FALSE(setup.model->in_call());
  EXPECT_TRUE(ends.all.empty());
  EXPECT_EQ(setup.model->order(steps.front()), steps);
  setup.spy->stream_synchronize(stream.get());
  setup.call(pages_between(0, 8));
  ASSERT_EQ(ends.all.size(), 1U);
  EXPECT_FALSE(ends.all[0].changed);
}

}  // namespace
}  // namespace penstock
