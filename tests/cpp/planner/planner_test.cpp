// Plans against an executor that knows nothing of how they were made, and against figures worked
// out by hand.
#include "planner/planner.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "error/error.hpp"

namespace penstock {
namespace {

using Pages = std::vector<PageIndex>;
using Steps = std::vector<Pages>;

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr double kLinkRate = 55e9;

PlanRequest request_of(std::size_t page_count, Steps steps, std::size_t frames,
                       std::vector<double> step_seconds = {}, Pages keep = {}, Pages stream = {}) {
  return {page_count,      16 * kMiB, std::move(steps), std::move(step_seconds),
          std::move(keep), frames,    kLinkRate,        std::move(stream)};
}

// One page a step, in order.
Steps single_pages(std::size_t count) {
  Steps steps;
  for (std::size_t page = 0; page < count; ++page) steps.push_back({static_cast<PageIndex>(page)});
  return steps;
}

bool is_resident(const Plan& plan, PageIndex page) {
  return std::binary_search(plan.resident.begin(), plan.resident.end(), page);
}

// Two pages of a step on one frame.
bool collides(const PlanRequest& request, const Plan& plan) {
  for (const auto& step : request.steps) {
    std::map<SlotIndex, PageIndex> users;
    for (const PageIndex page : step) {
      if (is_resident(plan, page)) continue;
      if (users.emplace(plan.slot[page], page).first->second != page) return true;
    }
  }
  return false;
}

// ---- what holds for every plan
// -------------------------------------------------------------------

void expect_in_shape(const PlanRequest& request, const Plan& plan) {
  EXPECT_LE(plan.frames(), request.frames);
  EXPECT_TRUE(std::is_sorted(plan.resident.begin(), plan.resident.end()));
  EXPECT_EQ(std::adjacent_find(plan.resident.begin(), plan.resident.end()), plan.resident.end());
  for (const PageIndex page : request.keep) EXPECT_TRUE(is_resident(plan, page)) << page;
  ASSERT_EQ(plan.slot.size(), request.page_count);
  for (PageIndex page = 0; page < request.page_count; ++page) {
    if (is_resident(plan, page)) {
      EXPECT_EQ(plan.slot[page], kResident) << page;
    } else {
      EXPECT_LT(plan.slot[page], plan.ring) << page;
    }
  }
  EXPECT_EQ(plan.bytes_per_pass, plan.loads.size() * request.page_size);
  EXPECT_EQ(plan.ring == 0, plan.resident.size() == request.page_count);
}

// Carries the loads out, pass after pass, and reads what each step reads. In the first pass pages
// may be missing, since nothing was loaded before it.
void expect_carried_out(const PlanRequest& request, const Plan& plan) {
  constexpr PageIndex kNothing = ~PageIndex{0};
  Pages content(plan.ring, kNothing);
  for (int pass = 0; pass < 3; ++pass) {
    std::size_t next = 0;
    for (StepIndex step = 0; step < request.steps.size(); ++step) {
      for (; next < plan.loads.size() && plan.loads[next].step == step; ++next) {
        const PageIndex page = plan.loads[next].page;
        ASSERT_FALSE(is_resident(plan, page));
        ASSERT_NE(content[plan.slot[page]], page) << "loaded though it is there";
        content[plan.slot[page]] = page;
      }
      for (const PageIndex page : request.steps[step]) {
        if (is_resident(plan, page)) continue;
        PageIndex& there = content[plan.slot[page]];
        if (pass == 0 && there == kNothing) there = page;
        ASSERT_EQ(there, page) << "step " << step << " of pass " << pass;
      }
    }
    ASSERT_EQ(next, plan.loads.size()) << "loads out of the order of steps";
  }
}

void expect_above_floors(const PlanRequest& request, const Plan& plan) {
  const double compute =
      std::accumulate(request.step_seconds.begin(), request.step_seconds.end(), 0.0);
  const double copies = static_cast<double>(plan.bytes_per_pass) / request.link_rate;
  EXPECT_GE(plan.seconds, compute);
  EXPECT_GE(plan.seconds, copies);
  EXPECT_DOUBLE_EQ(predict_seconds(request, plan), plan.seconds);
}

void expect_valid(const PlanRequest& request, const Plan& plan) {
  expect_in_shape(request, plan);
  expect_carried_out(request, plan);
  expect_above_floors(request, plan);
}

Plan valid_plan(const PlanRequest& request) {
  Plan plan = make_plan(request);
  expect_valid(request, plan);
  return plan;
}

// Of pages that are each read at one place: what is moved is what has no frame of its own, and no
// frame is without use.
void expect_optimal(const PlanRequest& request, const Plan& plan) {
  std::set<PageIndex> read;
  for (const auto& step : request.steps) read.insert(step.begin(), step.end());
  std::map<SlotIndex, std::size_t> users;
  std::size_t streamed = 0;
  for (const PageIndex page : read) {
    if (is_resident(plan, page)) continue;
    ++users[plan.slot[page]];
    ++streamed;
  }
  EXPECT_EQ(plan.frames(), std::min(request.frames, request.page_count));
  if (users.size() == 1 && streamed == 1) {
    EXPECT_EQ(plan.loads.size(), 0U);  // the one frame of the ring holds it for good
    return;
  }
  EXPECT_EQ(plan.loads.size(), streamed);
}

// ---- a model like Llama
// --------------------------------------------------------------------------

struct Llama {
  static constexpr std::size_t kLayers = 16;

  Llama() {
    add(16);  // embedding
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      const PageIndex first = pages_;
      steps.push_back({first - 1});  // the norm lies behind the weights of the layer before
      for (const std::size_t count : {2U, 1U, 1U, 2U}) add(count);
      steps.push_back({pages_ - 1});
      for (const std::size_t count : {7U, 7U, 7U}) add(count);
    }
    steps.push_back({pages_ - 1});
    add(16);  // head
  }

  void add(std::size_t count) {
    Pages pages(count);
    std::iota(pages.begin(), pages.end(), pages_);
    pages_ += static_cast<PageIndex>(count);
    steps.push_back(pages);
  }

  PlanRequest request(std::size_t frames, std::vector<double> step_seconds) const {
    return request_of(pages_, steps, frames, std::move(step_seconds));
  }

  PlanRequest request(std::size_t frames, double each = 30e-6) const {
    return request(frames, std::vector<double>(steps.size(), each));
  }

  // Each step takes its share of `seconds` by the pages it reads.
  PlanRequest request_by_pages(std::size_t frames, double seconds) const {
    std::vector<double> step_seconds;
    double all = 0;
    for (const auto& step : steps) all += static_cast<double>(step.size());
    for (const auto& step : steps) {
      step_seconds.push_back(seconds * static_cast<double>(step.size()) / all);
    }
    return request(frames, step_seconds);
  }

  Steps steps;

 private:
  PageIndex pages_ = 0;
};

double copy_seconds(const Plan& plan) {
  return static_cast<double>(plan.bytes_per_pass) / kLinkRate;
}

TEST(PlannerOnLlama, TightCapStreamsAtTheLinksRate) {
  const Plan plan = valid_plan(Llama().request(25));
  EXPECT_EQ(plan.frames(), 25U);
  EXPECT_LE(plan.seconds, 1.015 * copy_seconds(plan));
}

TEST(PlannerOnLlama, RingIsSmallWhereMostPagesStay) {
  constexpr std::size_t kFrames = 256;  // 4 GiB
  const PlanRequest request = Llama().request(kFrames);
  const Plan plan = valid_plan(request);
  EXPECT_LE(plan.ring, 12U);
  EXPECT_LE(plan.seconds, 1.02 * copy_seconds(plan));
  EXPECT_EQ(plan.loads.size(), request.page_count - plan.resident.size());
}

TEST(PlannerOnLlama, CopiesAndComputeOverlap) {
  const Llama llama;
  for (const std::size_t frames : {25U, 64U, 256U, 400U}) {
    const double copies = copy_seconds(make_plan(llama.request(frames)));
    const double each = copies / static_cast<double>(llama.steps.size());
    for (const PlanRequest& request :
         {llama.request_by_pages(frames, copies), llama.request(frames, each)}) {
      const Plan plan = valid_plan(request);
      EXPECT_LE(plan.seconds, 1.05 * std::max(copies, copy_seconds(plan))) << frames << " frames";
    }
  }
}

TEST(PlannerOnLlama, RingHasRoomForWhatTheModelLeavesOut) {
  const Llama llama;
  for (const std::size_t frames : {25U, 64U, 256U}) {
    PlanRequest request = llama.request(frames);
    for (const std::size_t room : {2U, 4U}) {
      const Plan plan = make_plan(request);
      for (const auto& step : request.steps) {
        const auto streamed = std::count_if(
            step.begin(), step.end(), [&](PageIndex page) { return !is_resident(plan, page); });
        EXPECT_GE(plan.ring, static_cast<std::size_t>(streamed) + room) << frames << " frames";
      }
      request.step_seconds.clear();
    }
  }
}

// ---- which pages stay
// ----------------------------------------------------------------------------

TEST(Planner, EverythingStaysWhereItFits) {
  const Plan plan = valid_plan(request_of(3, {{0}, {1, 2}}, 3, {0.25, 0.5}));
  EXPECT_EQ(plan.resident, (Pages{0, 1, 2}));
  EXPECT_EQ(plan.ring, 0U);
  EXPECT_TRUE(plan.loads.empty());
  EXPECT_DOUBLE_EQ(plan.seconds, 0.75);
}

TEST(Planner, NothingToPlanIsAPlan) {
  const Plan plan = valid_plan(request_of(0, {}, 0));
  EXPECT_EQ(plan.frames(), 0U);
  EXPECT_EQ(valid_plan(request_of(0, {{}, {}}, 0)).frames(), 0U);
}

TEST(Planner, OneFrameStreamsEverything) {
  const Plan plan = valid_plan(request_of(3, single_pages(3), 1));
  EXPECT_EQ(plan.ring, 1U);
  EXPECT_EQ(plan.loads.size(), 3U);
}

TEST(Planner, KeptPagesStay) {
  const PlanRequest request = request_of(8, single_pages(7), 4, {}, {6, 7, 6});
  EXPECT_EQ(least_frames(request), 3U);
  const Plan plan = valid_plan(request);
  EXPECT_TRUE(is_resident(plan, 6));
  EXPECT_TRUE(is_resident(plan, 7));  // read by no step
}

TEST(Planner, PagesThatMustStreamDoSoWhereThereIsRoom) {
  const PlanRequest request = request_of(8, single_pages(8), 8, {}, {7}, {0, 1, 2, 7, 1});
  const Plan plan = valid_plan(request);
  EXPECT_EQ(plan.resident, (Pages{3, 4, 5, 6, 7}));  // what is kept is kept
  EXPECT_EQ(plan.ring, 1U);
  EXPECT_EQ(plan.loads.size(), 3U);
}

TEST(Planner, PagesThatMustStreamDoSoBeforeAnythingIsKnown) {
  const Plan plan = valid_plan(request_of(6, {}, 6, {}, {}, {0, 5}));
  EXPECT_EQ(plan.resident, (Pages{1, 2, 3}));
  EXPECT_GE(plan.ring, 1U);
}

TEST(Planner, PageOfSeveralPlacesStaysBeforeOthers) {
  Steps steps = single_pages(24);
  steps[8].push_back(0);
  steps[16].push_back(0);
  const Plan plan = valid_plan(request_of(24, steps, 6, std::vector<double>(24, 1e-5)));
  EXPECT_TRUE(is_resident(plan, 0));
  EXPECT_EQ(plan.loads.size(), 24 - plan.resident.size());
}

TEST(Planner, PageOfSeveralPlacesIsLoadedSeveralTimesWhereItCannotStay) {
  Steps steps = single_pages(12);
  steps.insert(steps.begin() + 6, {0});
  const Plan plan = valid_plan(request_of(12, steps, 1));
  EXPECT_EQ(plan.loads.size(), 13U);
  EXPECT_EQ(plan.loads[0].page, 0U);
  EXPECT_EQ(plan.loads[6].page, 0U);
  EXPECT_EQ(plan.loads[6].step, 6U);
}

TEST(Planner, LargeStepKeepsPagesWhereTheRingIsSmaller) {
  Steps steps = single_pages(100);
  for (PageIndex page = 100; page < 140; ++page) steps[50].push_back(page);
  const PlanRequest request = request_of(140, steps, 60, std::vector<double>(100, 30e-6));
  const Plan plan = valid_plan(request);
  EXPECT_FALSE(collides(request, plan));
  EXPECT_LT(plan.ring, 20U);
  EXPECT_EQ(plan.frames(), 60U);
  EXPECT_EQ(plan.loads.size(), 140 - plan.resident.size());
}

TEST(Planner, StreamedPagesAreSpreadOverThePass) {
  const Plan plan =
      valid_plan(request_of(100, single_pages(100), 60, std::vector<double>(100, 1e-4)));
  for (PageIndex first = 0; first < 100; first += 20) {
    std::size_t streamed = 0;
    for (PageIndex page = first; page < first + 20; ++page) streamed += !is_resident(plan, page);
    EXPECT_NEAR(static_cast<double>(streamed), static_cast<double>(plan.loads.size()) / 5, 2.0);
  }
}

std::size_t streaming_steps(const Plan& plan, const Steps& steps) {
  return static_cast<std::size_t>(std::count_if(steps.begin(), steps.end(), [&](const auto& pages) {
    return std::any_of(pages.begin(), pages.end(),
                       [&](PageIndex page) { return !is_resident(plan, page); });
  }));
}

TEST(Planner, WhatStreamsIsOfFewStepsAllOverThePass) {
  Steps steps;  // three pages each, the first and last of which their neighbours read, too
  for (PageIndex i = 0; i < 60; ++i) steps.push_back({2 * i, 2 * i + 1, 2 * i + 2});
  const std::vector<double> seconds(steps.size(), 20e-6);
  for (const std::size_t frames : {71U, 91U, 111U}) {
    const Plan plan = valid_plan(request_of(121, steps, frames, seconds));
    EXPECT_EQ(plan.loads.size(), 121 - plan.resident.size());
    EXPECT_LE(plan.ring, 4U);
    // As many as there are pages: each streamed page is one that a single step reads.
    EXPECT_EQ(streaming_steps(plan, steps), plan.loads.size());
    std::vector<std::size_t> gaps;
    for (std::size_t i = 0; i + 1 < plan.loads.size(); ++i) {
      gaps.push_back(plan.loads[i + 1].step - plan.loads[i].step);
    }
    const auto [least, most] = std::minmax_element(gaps.begin(), gaps.end());
    EXPECT_LE(*most - *least, 1U);
  }
}

TEST(Planner, PagesOfSeveralStepsStreamWhereTheOthersAreTooFew) {
  Steps steps;
  for (PageIndex i = 0; i < 60; ++i) steps.push_back({2 * i, 2 * i + 1, 2 * i + 2});
  const Plan plan = valid_plan(request_of(121, steps, 21, std::vector<double>(60, 20e-6)));
  EXPECT_EQ(plan.loads.size(), 121 - plan.resident.size());
  EXPECT_EQ(plan.frames(), 21U);
}

TEST(Planner, PagesThatNoStepReadsGetAFrameOfTheRing) {
  const Plan plan = valid_plan(request_of(10, single_pages(6), 8));
  EXPECT_EQ(plan.resident, (Pages{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(plan.ring, 2U);
  EXPECT_TRUE(plan.loads.empty());
  const Plan tight = valid_plan(request_of(10, single_pages(6), 6));
  EXPECT_EQ(tight.ring, 1U);
  EXPECT_TRUE(tight.loads.empty());
}

TEST(Planner, WithoutStepsTheFirstPagesStay) {
  const Plan plan = valid_plan(request_of(40, {}, 20, {}, {39}));
  EXPECT_EQ(plan.ring, 4U);  // 64 MiB
  EXPECT_EQ(plan.resident, (Pages{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 39}));
  EXPECT_EQ(valid_plan(request_of(2, {}, 1)).ring, 1U);
}

// ---- the ring
// ------------------------------------------------------------------------------------

// The fewest other pages that are loaded between two loads of one frame, through the pass's end.
std::size_t shortest_distance(const Plan& plan) {
  std::map<SlotIndex, std::size_t> last;
  std::size_t shortest = plan.loads.size();
  for (std::size_t i = 0; i < 2 * plan.loads.size(); ++i) {
    const SlotIndex slot = plan.slot[plan.loads[i % plan.loads.size()].page];
    const auto found = last.find(slot);
    if (found != last.end()) shortest = std::min(shortest, i - found->second);
    last[slot] = i;
  }
  return shortest;
}

TEST(Planner, EndOfThePassMeetsItsStartAWholeRoundLater) {
  for (std::size_t pages = 3; pages < 60; ++pages) {
    for (std::size_t frames = 1; frames < pages; frames += 3) {
      const Plan plan = valid_plan(request_of(pages, single_pages(pages), frames));
      const std::size_t loads = plan.loads.size();
      const std::size_t rounds = (loads + plan.ring - 1) / plan.ring;
      EXPECT_GE(shortest_distance(plan), loads / rounds)
          << pages << " pages, " << frames << " frames, ring " << plan.ring;
    }
  }
}

TEST(Planner, ForwardAndBackwardTurnAtBothEnds) {
  constexpr std::size_t kPages = 30;
  Steps steps = single_pages(kPages);
  for (PageIndex page = kPages; page-- > 0;) steps.push_back({page});
  const PlanRequest request = request_of(kPages, steps, 10, std::vector<double>(2 * kPages, 1e-4));
  const Plan plan = valid_plan(request);
  // What is in the ring at either end is read again first.
  EXPECT_LE(plan.loads.size(), 2 * (kPages - request.frames));
  EXPECT_FALSE(collides(request, plan));
}

TEST(Planner, StepsThatShareTheirPagesInACircleCollideWithTwoFrames) {
  const Steps steps = {{0, 1}, {1, 2}, {2, 0}};
  EXPECT_EQ(least_frames(request_of(3, steps, 2)), 2U);
  const Plan plan = make_plan(request_of(3, steps, 2));
  expect_in_shape(request_of(3, steps, 2), plan);
  EXPECT_TRUE(collides(request_of(3, steps, 2), plan));  // no choice of frames avoids it
}

TEST(Planner, RingOfUnknownTimesHolds64MiB) {
  PlanRequest request = request_of(400, single_pages(400), 200);
  request.page_size = 2 * kMiB;
  EXPECT_NEAR(static_cast<double>(valid_plan(request).ring), 34, 4);
  request.frames = 20;
  EXPECT_EQ(valid_plan(request).ring, 10U);
}

// ---- time
// ----------------------------------------------------------------------------------------

// A page is copied in a second.
PlanRequest slow_request(Steps steps, std::size_t frames, std::vector<double> step_seconds) {
  PlanRequest request = request_of(8, std::move(steps), frames, std::move(step_seconds));
  request.link_rate = static_cast<double>(request.page_size);
  return request;
}

constexpr double kOverheads = 1e-3;

TEST(PredictSeconds, OneFrameAlternatesBetweenCopyAndStep) {
  const PlanRequest request = slow_request(single_pages(8), 1, std::vector<double>(8, 0.5));
  EXPECT_NEAR(make_plan(request).seconds, 8 * 1.5, kOverheads);
}

TEST(PredictSeconds, SecondFrameOverlapsThem) {
  const PlanRequest request = slow_request(single_pages(8), 2, std::vector<double>(8, 0.5));
  Plan plan;
  plan.ring = 2;
  for (PageIndex page = 0; page < 8; ++page) {
    plan.slot.push_back(page % 2);
    plan.loads.push_back({page, page});
  }
  EXPECT_NEAR(predict_seconds(request, plan), 8.0, kOverheads);
}

TEST(PredictSeconds, CopyWaitsForTheLastReaderOfItsFrame) {
  // Page 0 is read by the first three steps, and page 1 comes into its frame after them.
  const PlanRequest request = slow_request({{0}, {0}, {0}, {1}}, 1, {2, 2, 2, 0});
  Plan plan;
  plan.ring = 1;
  plan.slot = {0, 0, kResident, kResident, kResident, kResident, kResident, kResident};
  plan.loads = {{0, 0}, {1, 3}};
  EXPECT_NEAR(predict_seconds(request, plan), 6 + 2, kOverheads);
}

TEST(PredictSeconds, ComputeAloneWhereCopiesHideBehindIt) {
  const PlanRequest request = slow_request(single_pages(8), 4, std::vector<double>(8, 3));
  EXPECT_NEAR(make_plan(request).seconds, 24, kOverheads);
}

// ---- refusals
// ------------------------------------------------------------------------------------

TEST(Planner, TooFewFramesAreRefusedWithTheNumbers) {
  const PlanRequest request = request_of(9, {{0}, {1, 2, 3, 3}, {4}}, 4, {}, {1, 7, 8});
  EXPECT_EQ(least_frames(request), 5U);
  try {
    make_plan(request);
    FAIL() << "planned";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.requested, 5 * request.page_size);
    EXPECT_EQ(error.cap, 4 * request.page_size);
    const std::string message = error.what();
    for (const char* part : {"2 pages", "3 that have to stay", "5 frames", "80.00 MiB", "are 4",
                             "64.00 MiB", "raise the cap by 16.00 MiB"}) {
      EXPECT_NE(message.find(part), std::string::npos) << part << " in " << message;
    }
  }
  EXPECT_THROW(make_plan(request_of(1, {}, 0)), CapExceededError);
  EXPECT_THROW(make_plan(request_of(2, {{0}}, 1, {}, {0})), CapExceededError);
}

TEST(Planner, ContradictionsAreRefused) {
  const PlanRequest good = request_of(2, {{0}, {1}}, 1);
  auto refused = [&](auto change) {
    PlanRequest bad = good;
    change(bad);
    EXPECT_THROW(make_plan(bad), std::invalid_argument);
    EXPECT_THROW(least_frames(bad), std::invalid_argument);
  };
  valid_plan(good);
  refused([](PlanRequest& r) { r.step_seconds = {1}; });
  refused([](PlanRequest& r) { r.step_seconds = {1, -1}; });
  refused([](PlanRequest& r) { r.step_seconds = {1, std::nan("")}; });
  refused([](PlanRequest& r) { r.steps[1] = {2}; });
  refused([](PlanRequest& r) { r.keep = {2}; });
  refused([](PlanRequest& r) { r.link_rate = 0; });
  refused([](PlanRequest& r) { r.link_rate = -1; });
  refused([](PlanRequest& r) { r.link_rate = std::nan(""); });
  refused([](PlanRequest& r) { r.page_size = 0; });
}

// ---- random schedules
// ----------------------------------------------------------------------------

struct Random {
  std::mt19937 engine;
  std::size_t below(std::size_t limit) { return engine() % limit; }
};

std::vector<double> random_seconds(Random& random, std::size_t count) {
  std::vector<double> seconds;
  if (random.below(3) == 0) return seconds;
  const double scale = random.below(2) == 0 ? 1e-3 : 1e-5;
  for (std::size_t i = 0; i < count; ++i) {
    seconds.push_back(scale * static_cast<double>(random.below(10)));
  }
  return seconds;
}

TEST(PlannerOnRandomSchedules, PagesOfOnePlaceMoveTheOptimum) {
  for (unsigned seed = 0; seed < 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random{std::mt19937(seed)};
    const std::size_t page_count = 1 + random.below(60);
    Steps steps(1 + random.below(20));
    std::size_t step = 0;
    for (PageIndex page = 0; page < page_count; ++page) {
      if (random.below(20) == 0) continue;
      steps[step].push_back(page);
      if (random.below(4) == 0) steps[step].push_back(page);
      if (random.below(3) != 0) step = std::min(step + 1, steps.size() - 1);
    }
    Pages keep;
    for (std::size_t n = random.below(4) * random.below(2); n > 0; --n) {
      keep.push_back(static_cast<PageIndex>(random.below(page_count)));
    }
    const std::vector<double> seconds = random_seconds(random, steps.size());
    PlanRequest request = request_of(page_count, steps, 0, seconds, keep);
    const std::size_t least = least_frames(request);
    request.frames = least + random.below(page_count + 2 - std::min(least, page_count));
    const Plan plan = valid_plan(request);
    EXPECT_FALSE(collides(request, plan));
    expect_optimal(request, plan);
    if (HasFailure()) return;
  }
}

TEST(PlannerOnRandomSchedules, PagesOfSeveralPlacesAreInPlaceForEachStep) {
  for (unsigned seed = 0; seed < 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random{std::mt19937(seed)};
    const std::size_t page_count = 1 + random.below(40);
    Steps steps(1 + random.below(20));
    for (auto& step : steps) {
      for (std::size_t n = random.below(5); n > 0; --n) {
        step.push_back(static_cast<PageIndex>(random.below(page_count)));
      }
    }
    const std::vector<double> seconds = random_seconds(random, steps.size());
    PlanRequest request = request_of(page_count, steps, 0, seconds);
    const std::size_t least = least_frames(request);
    request.frames = least + random.below(page_count + 2 - least);
    const Plan plan = make_plan(request);
    expect_in_shape(request, plan);
    if (collides(request, plan)) {
      // With more frames than any page has neighbours, there is always one for it.
      std::size_t most = 0;
      for (PageIndex page = 0; page < page_count; ++page) {
        std::set<PageIndex> together;
        for (const auto& step : steps) {
          if (std::count(step.begin(), step.end(), page) > 0) {
            together.insert(step.begin(), step.end());
          }
        }
        most = std::max(most, together.size());
      }
      EXPECT_LT(request.frames, most);
    } else {
      expect_valid(request, plan);
    }
    if (HasFailure()) return;
  }
}

TEST(Planner, SameRequestSamePlan) {
  const PlanRequest request = Llama().request(64);
  const Plan first = make_plan(request);
  const Plan second = make_plan(request);
  EXPECT_EQ(first.resident, second.resident);
  EXPECT_EQ(first.slot, second.slot);
  EXPECT_EQ(first.seconds, second.seconds);
}

TEST(Planner, TenThousandPagesArePlannedWhileNobodyNotices) {
  constexpr std::size_t kPages = 10000;
  Steps steps(2000);
  for (PageIndex page = 0; page < kPages; ++page) steps[page / 5].push_back(page);
  for (const std::size_t frames : {10U, 1000U, 5000U, 9500U}) {
    for (const bool timed : {true, false}) {
      const std::vector<double> seconds(timed ? steps.size() : 0, 1e-3);
      const auto start = std::chrono::steady_clock::now();
      make_plan(request_of(kPages, steps, frames, seconds));
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      EXPECT_LT(taken.count(), 60.0);  // well under one without sanitizers
    }
  }
}

TEST(Planner, LittlePagesHaveARingForCopiesOfSeveralSteps) {
  PlanRequest request = request_of(400, single_pages(400), 200, std::vector<double>(400, 1e-6));
  EXPECT_LE(make_plan(request).ring, 5U);
  request.page_size = 2 * kMiB;
  const Plan plan = make_plan(request);
  EXPECT_GE(plan.ring, 12U);  // a sixteenth of the frames
  EXPECT_EQ(plan.loads.size(), 400 - plan.resident.size());
  request.frames = 12;
  EXPECT_LE(make_plan(request).ring, 5U);
}

TEST(Planner, MoreFramesDoNotStreamMore) {
  Steps steps = single_pages(100);
  steps[40] = {40, 41, 42, 43, 44, 45, 46, 47};
  PlanRequest request = request_of(100, steps, 0, std::vector<double>(100, 1e-6));
  for (const std::size_t mib : {2, 4, 8}) {
    request.page_size = mib * kMiB;
    std::size_t before = 100;
    for (request.frames = 12; request.frames <= 100; ++request.frames) {
      const std::size_t loads = make_plan(request).loads.size();
      EXPECT_LE(loads, before) << request.frames << " frames of " << mib << " MiB";
      before = loads;
    }
  }
}

// ---- a ring that is asked for ------------------------------------------------------------------

TEST(Planner, RingIsAsLargeAsItIsAskedToBe) {
  PlanRequest request = request_of(60, single_pages(60), 20, std::vector<double>(60, 1e-5));
  const std::size_t usual = make_plan(request).ring;
  for (std::size_t least = 0; least <= 20; ++least) {
    request.least_ring = least;
    const Plan plan = make_plan(request);
    EXPECT_GE(plan.ring + 2, std::max(least, usual));  // idle ones have a resident each
    EXPECT_EQ(plan.frames(), 20U);
    EXPECT_EQ(plan.loads.size(), 60 - plan.resident.size());
  }
  request.least_ring = 1000;
  EXPECT_EQ(make_plan(request).ring, 20U);
  request.keep = {3, 4, 5};
  EXPECT_EQ(make_plan(request).ring, 17U);
  request.frames = 60;
  EXPECT_EQ(make_plan(request).ring, 0U);
}

}  // namespace
}  // namespace penstock
