// The page table against its drawing, and its victims against a reference that is written the slow
// and obvious way.
#include "managed/page_table.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"

namespace penstock {
namespace {

using Pages = std::vector<PageIndex>;
using Steps = std::vector<Pages>;

constexpr std::array<PageState, 4> kStates = {PageState::kAbsent, PageState::kLoading,
                                              PageState::kResident, PageState::kEvicting};

// Brings page 0 of a fresh table into a state.
void bring(PageTable& table, PageState state, PageIndex page = 0) {
  if (state == PageState::kAbsent) return;
  table.begin_load(page);
  if (state == PageState::kLoading) return;
  table.finish_load(page);
  if (state == PageState::kEvicting) table.begin_evict(page);
}

// ---- transitions -------------------------------------------------------------------------------

struct Transition {
  const char* name;
  void (PageTable::*call)(PageIndex);
  PageState from;
  PageState to;
};

const std::array<Transition, 6> kTransitions = {{
    {"begin_load", &PageTable::begin_load, PageState::kAbsent, PageState::kLoading},
    {"finish_load", &PageTable::finish_load, PageState::kLoading, PageState::kResident},
    {"cancel_load", &PageTable::cancel_load, PageState::kLoading, PageState::kAbsent},
    {"begin_evict", &PageTable::begin_evict, PageState::kResident, PageState::kEvicting},
    {"finish_evict", &PageTable::finish_evict, PageState::kEvicting, PageState::kAbsent},
    {"cancel_evict", &PageTable::cancel_evict, PageState::kEvicting, PageState::kResident},
}};

TEST(PageTable, AllowsTheDrawnTransitionsAndNoOthers) {
  for (const auto& transition : kTransitions) {
    for (const PageState state : kStates) {
      SCOPED_TRACE(std::string(transition.name) + " in state " +
                   std::to_string(static_cast<int>(state)));
      PageTable table(2);
      bring(table, state);
      if (state == transition.from) {
        (table.*transition.call)(0);
        EXPECT_EQ(table.state(0), transition.to);
      } else {
        EXPECT_THROW((table.*transition.call)(0), ScheduleError);
        EXPECT_EQ(table.state(0), state);
      }
      std::size_t sum = 0;
      for (const PageState each : kStates) sum += table.count(each);
      EXPECT_EQ(sum, 2U);
      EXPECT_EQ(table.count(table.state(0)), table.state(0) == PageState::kAbsent ? 2U : 1U);
      EXPECT_EQ(table.state(1), PageState::kAbsent);
      EXPECT_EQ(table.victims(2), table.state(0) == PageState::kResident ? Pages{0} : Pages{});
    }
  }
}

TEST(PageTable, RefusesPagesThatDoNotExist) {
  PageTable table(3);
  for (const auto& transition : kTransitions) {
    EXPECT_THROW((table.*transition.call)(3), std::out_of_range) << transition.name;
  }
  EXPECT_THROW(table.pin(3), std::out_of_range);
  EXPECT_THROW(table.unpin(3), std::out_of_range);
  EXPECT_THROW(table.touch(3), std::out_of_range);
  EXPECT_THROW(table.kept(3), std::out_of_range);
  EXPECT_THROW(table.state(3), std::out_of_range);
  EXPECT_THROW(table.next_use(3), std::out_of_range);
  EXPECT_THROW(table.set_schedule({{0}, {1, 3}}), std::out_of_range);
  EXPECT_TRUE(table.schedule().empty());
  EXPECT_EQ(PageTable(0).victims(1), Pages{});
}

TEST(PageTable, PinnedPageIsNoVictimInAnyState) {
  for (const PageState state : kStates) {
    PageTable table(1);
    bring(table, state);
    table.pin(0);
    table.pin(0);
    EXPECT_EQ(table.pins(0), 2U);
    if (state == PageState::kLoading) table.finish_load(0);
    if (state == PageState::kEvicting) table.cancel_evict(0);
    EXPECT_EQ(table.victims(1), Pages{});
    EXPECT_THROW(table.begin_evict(0), ScheduleError);
    table.unpin(0);
    EXPECT_EQ(table.victims(1), Pages{});  // pinned once more
    EXPECT_THROW(table.begin_evict(0), ScheduleError);
    table.unpin(0);
    EXPECT_EQ(table.victims(1), state == PageState::kAbsent ? Pages{} : Pages{0});
    EXPECT_THROW(table.unpin(0), ScheduleError);
  }
}

// ---- schedules ---------------------------------------------------------------------------------

// The first time after `now` at which the schedule, repeated for ever, reads the page.
StepTime next_use_by_walking(const Steps& steps, PageIndex page, StepTime now) {
  for (StepTime time = now + 1; time <= now + steps.size(); ++time) {
    const Pages& read = steps[(time - 1) % steps.size()];
    if (std::count(read.begin(), read.end(), page) > 0) return time;
  }
  return kNever;
}

Steps random_steps(std::mt19937& random, std::size_t page_count) {
  Steps steps(1 + random() % 12);
  for (auto& step : steps) {
    for (std::size_t n = random() % 4; n > 0; --n) {
      step.push_back(static_cast<PageIndex>(random() % page_count));
    }
  }
  return steps;
}

TEST(Schedule, NextUseCountsOnIntoTheNextPass) {
  const Steps steps = {{0}, {1}, {0, 2}};
  const Schedule schedule(4, steps);
  EXPECT_EQ(schedule.next_use(0, 0), 1U);
  EXPECT_EQ(schedule.next_use(0, 1), 3U);
  EXPECT_EQ(schedule.next_use(0, 3), 4U);  // the first step of the second pass
  EXPECT_EQ(schedule.next_use(1, 2), 5U);
  EXPECT_EQ(schedule.next_use(3, 0), kNever);
  EXPECT_EQ(Schedule().next_use(0, 0), kNever);
}

TEST(Schedule, TimeOfAStepIsItsNextOccurrence) {
  const Schedule schedule(1, {{0}, {0}, {0}});
  EXPECT_EQ(schedule.time_of(0, 0), 1U);
  EXPECT_EQ(schedule.time_of(2, 0), 3U);
  EXPECT_EQ(schedule.time_of(0, 1), 4U);
  EXPECT_EQ(schedule.time_of(2, 3), 6U);
  EXPECT_EQ(schedule.time_of(1, 7), 8U);
  EXPECT_THROW(schedule.time_of(3, 0), std::out_of_range);
  EXPECT_THROW(Schedule().time_of(0, 0), std::out_of_range);
}

TEST(Schedule, NextUseAgreesWithWalkingThroughRandomSchedules) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const std::size_t page_count = 1 + random() % 8;
    const Steps steps = random_steps(random, page_count);
    const Schedule schedule(page_count, steps);
    for (PageIndex page = 0; page < page_count; ++page) {
      for (StepTime now = 0; now < 3 * steps.size(); ++now) {
        ASSERT_EQ(schedule.next_use(page, now), next_use_by_walking(steps, page, now));
      }
    }
  }
}

TEST(PageTable, AdvanceTakesSkippedStepsAndWrapsAround) {
  PageTable table(4);
  table.set_schedule({{0}, {1}, {2}, {0, 3}});
  EXPECT_EQ(table.now(), 0U);
  EXPECT_EQ(table.next_use(1), 2U);
  table.advance(2);  // steps 0 and 1 were skipped: they come again in the next pass
  EXPECT_EQ(table.now(), 3U);
  EXPECT_EQ(table.next_use(0), 4U);
  EXPECT_EQ(table.next_use(1), 6U);
  EXPECT_EQ(table.next_use(2), 7U);
  table.advance(2);  // the same step again is a whole pass
  EXPECT_EQ(table.now(), 7U);
  EXPECT_EQ(table.next_use(3), 8U);
  table.advance(0);
  EXPECT_EQ(table.now(), 9U);
  EXPECT_THROW(table.advance(4), std::out_of_range);
  EXPECT_EQ(table.now(), 9U);
  table.set_schedule({{3}});
  EXPECT_EQ(table.now(), 0U);
  EXPECT_EQ(table.next_use(3), 1U);
  EXPECT_EQ(table.next_use(0), kNever);
  table.set_schedule({});
  EXPECT_EQ(table.next_use(3), kNever);
  EXPECT_THROW(table.advance(0), std::out_of_range);
}

// ---- victims -----------------------------------------------------------------------------------

TEST(PageTable, WithoutAScheduleTheLeastRecentlyUsedGoesFirst) {
  PageTable table(4);
  for (PageIndex page = 0; page < 4; ++page) bring(table, PageState::kResident, page);
  EXPECT_EQ(table.victims(4), (Pages{3, 2, 1, 0}));  // none was used: the highest index first
  for (const PageIndex page : {2, 0, 3, 1}) table.touch(page);
  EXPECT_EQ(table.victims(4), (Pages{2, 0, 3, 1}));
  table.touch(2);
  EXPECT_EQ(table.victims(2), (Pages{0, 3}));
  EXPECT_EQ(table.victims(0), Pages{});
}

TEST(PageTable, TheFarthestNextUseGoesFirstAndUnnamedPagesBeforeAll) {
  PageTable table(5);
  for (PageIndex page = 0; page < 5; ++page) bring(table, PageState::kResident, page);
  table.set_schedule({{0}, {1}, {2}, {3}});
  table.touch(4);
  EXPECT_EQ(table.victims(5), (Pages{4, 3, 2, 1, 0}));
  table.advance(1);
  EXPECT_EQ(table.victims(5), (Pages{4, 1, 0, 3, 2}));
  EXPECT_EQ(table.victims(5, 4), (Pages{4, 1, 0}));  // used later than time 4
  EXPECT_EQ(table.victims(5, 6), (Pages{4}));
  EXPECT_EQ(table.victims(5, kNever), Pages{});
}

TEST(PageTable, PagesThatAreNotKeptGoFirstTheLeastRecentlyUsedBeforeTheOthers) {
  PageTable table(6);
  for (PageIndex page = 0; page < 6; ++page) bring(table, PageState::kResident, page);
  table.set_schedule({{0}, {1}, {2}, {3}, {4}, {5}});
  for (const PageIndex page : {4, 0, 1, 5, 3, 2}) table.touch(page);
  EXPECT_EQ(table.victims(6), (Pages{5, 4, 3, 2, 1, 0}));
  table.keep({1, 4, 1});
  EXPECT_EQ(table.kept_count(), 2U);
  EXPECT_TRUE(table.kept(1));
  EXPECT_FALSE(table.kept(0));
  EXPECT_EQ(table.victims(6), (Pages{0, 5, 3, 2, 4, 1}));  // the kept ones by farthest next use
  EXPECT_EQ(table.victims(5), (Pages{0, 5, 3, 2, 4}));
  table.advance(0);
  EXPECT_EQ(table.victims(6), (Pages{0, 5, 3, 2, 4, 1}));
  table.advance(2);
  EXPECT_EQ(table.victims(6), (Pages{0, 5, 3, 2, 1, 4}));
  table.keep({});  // no plan
  EXPECT_EQ(table.kept_count(), 0U);
  EXPECT_EQ(table.victims(6), (Pages{2, 1, 0, 5, 4, 3}));
}

TEST(PageTable, LookAheadTakesNeitherKeptPagesNorThoseThatAreUsedSooner) {
  PageTable table(6);
  for (PageIndex page = 0; page < 6; ++page) bring(table, PageState::kResident, page);
  table.set_schedule({{0}, {1}, {2}, {3}, {4}});  // 5 never
  for (const PageIndex page : {3, 0, 5, 4, 1, 2}) table.touch(page);
  table.keep({0, 4});
  EXPECT_EQ(table.victims(6, 1), (Pages{3, 5, 1, 2}));
  EXPECT_EQ(table.victims(6, 2), (Pages{3, 5, 2}));
  EXPECT_EQ(table.victims(6, 3), (Pages{3, 5}));  // 2 is used at 3, though it comes after 5
  EXPECT_EQ(table.victims(1, 4), (Pages{5}));
  EXPECT_EQ(table.victims(6, kNever), Pages{});
}

TEST(PageTable, UseByTheStepThatHasComeIsToComeUntilThePageIsPinned) {
  PageTable table(2);
  EXPECT_EQ(table.use_to_come(0), kNever);
  table.set_schedule({{0}, {1}, {0}});
  EXPECT_EQ(table.use_to_come(0), 1U);
  table.advance(0);
  EXPECT_EQ(table.use_to_come(0), 1U);
  table.pin(0);
  EXPECT_EQ(table.use_to_come(0), 3U);
  table.unpin(0);
  EXPECT_EQ(table.use_to_come(0), 3U);
  table.advance(2);
  EXPECT_EQ(table.use_to_come(0), 3U);
  table.set_schedule({{1}, {0}});  // times begin anew
  table.advance(1);
  EXPECT_EQ(table.use_to_come(0), 2U);
}

TEST(PageTable, KeptPageStaysKeptWhenItIsGone) {
  PageTable table(2);
  table.keep({0});
  bring(table, PageState::kResident, 0);
  bring(table, PageState::kResident, 1);
  EXPECT_EQ(table.victims(2), (Pages{1, 0}));
  table.begin_evict(0);
  table.finish_evict(0);
  EXPECT_TRUE(table.kept(0));
  bring(table, PageState::kResident, 0);
  EXPECT_EQ(table.victims(2), (Pages{1, 0}));
  EXPECT_THROW(table.keep({1, 2}), std::out_of_range);
  EXPECT_EQ(table.victims(2), (Pages{1, 0}));
  EXPECT_FALSE(table.kept(1));
}

// The rules of the header, in so many words.
class Reference {
 public:
  explicit Reference(std::size_t page_count) : pages_(page_count) {}

  struct Page {
    PageState state = PageState::kAbsent;
    unsigned pins = 0;
    unsigned last_use = 0;
    bool kept = false;
  };
  std::vector<Page> pages_;
  Steps steps_;
  StepTime now_ = 0;
  unsigned uses_ = 0;

  StepTime next_use(PageIndex page) const {
    return steps_.empty() ? kNever : next_use_by_walking(steps_, page, now_);
  }

  bool planned() const {
    return std::any_of(pages_.begin(), pages_.end(), [](const Page& page) { return page.kept; });
  }

  template <typename Is>
  std::size_t count(Is is) const {
    return static_cast<std::size_t>(std::count_if(pages_.begin(), pages_.end(), is));
  }

  Pages victims(std::size_t limit, StepTime after) const {
    Pages all;
    for (PageIndex page = 0; page < pages_.size(); ++page) {
      const Page& each = pages_[page];
      if (each.state == PageState::kResident && each.pins == 0 && next_use(page) > after &&
          !(each.kept && after > 0)) {
        all.push_back(page);
      }
    }
    std::sort(all.begin(), all.end(), [&](PageIndex a, PageIndex b) {
      if (pages_[a].kept != pages_[b].kept) return pages_[b].kept;
      const bool by_next_use = pages_[a].kept || !planned();
      if (by_next_use && next_use(a) != next_use(b)) return next_use(a) > next_use(b);
      if (pages_[a].last_use != pages_[b].last_use) return pages_[a].last_use < pages_[b].last_use;
      return a > b;
    });
    if (all.size() > limit) all.resize(limit);
    return all;
  }
};

constexpr auto kIsMissing = [](const Reference::Page& each) {
  return each.kept && each.state != PageState::kResident;
};
constexpr auto kPassesInUse = [](const Reference::Page& each) {
  return !each.kept && each.pins > 0;
};

TEST(PageTable, AgreesWithTheReferenceOnRandomHistories) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    const std::size_t page_count = 1 + random() % 12;
    PageTable table(page_count);
    Reference reference(page_count);
    for (int i = 0; i < 300; ++i) {
      const auto page = static_cast<PageIndex>(random() % page_count);
      Reference::Page& expected = reference.pages_[page];
      switch (random() % 9) {
        case 8:
          if (random() % 4 == 0) {
            const auto other = static_cast<PageIndex>(random() % page_count);
            const bool none = random() % 3 == 0;
            table.keep(none ? Pages{} : Pages{page, other});
            for (auto& each : reference.pages_) each.kept = false;
            if (!none) reference.pages_[page].kept = reference.pages_[other].kept = true;
          }
          break;
        case 0:
          table.pin(page);
          ++expected.pins;
          break;
        case 1:
          if (expected.pins > 0) {
            table.unpin(page);
            --expected.pins;
          }
          break;
        case 2:
          table.touch(page);
          expected.last_use = ++reference.uses_;
          break;
        case 3:
          if (random() % 8 == 0) {
            reference.steps_ = random_steps(random, page_count);
            reference.now_ = 0;
            table.set_schedule(reference.steps_);
          }
          break;
        case 4:
          if (!reference.steps_.empty()) {
            const auto step = static_cast<StepIndex>(random() % reference.steps_.size());
            table.advance(step);
            do {
              ++reference.now_;
            } while ((reference.now_ - 1) % reference.steps_.size() != step);
          }
          break;
        default: {
          const Transition& transition = kTransitions[random() % kTransitions.size()];
          const bool pinned = transition.to == PageState::kEvicting && expected.pins > 0;
          if (expected.state != transition.from || pinned) break;
          (table.*transition.call)(page);
          expected.state = transition.to;
        }
      }
      const std::size_t limit = random() % (page_count + 1);
      const StepTime after = random() % 3 == 0 ? reference.now_ + random() % 6 : 0;
      ASSERT_EQ(table.victims(limit, after), reference.victims(limit, after)) << "seed " << seed;
      ASSERT_EQ(table.next_use(page), reference.next_use(page)) << "seed " << seed;
      ASSERT_EQ(table.kept_missing(), reference.count(kIsMissing)) << "seed " << seed;
      ASSERT_EQ(table.pinned_passing(), reference.count(kPassesInUse)) << "seed " << seed;
    }
  }
}

TEST(PageTable, CyclicScheduleMovesTheOptimumAndNotLeastRecentlyUsedsWorstCase) {
  constexpr std::size_t kPages = 16;
  constexpr std::size_t kFrames = 10;
  PageTable table(kPages);
  Steps steps;
  for (PageIndex page = 0; page < kPages; ++page) steps.push_back({page});
  table.set_schedule(steps);
  std::size_t loads = 0;
  constexpr int kPasses = 8;
  for (int pass = 0; pass < kPasses; ++pass) {
    if (pass == 1) loads = 0;  // the first pass fills
    for (PageIndex page = 0; page < kPages; ++page) {
      table.advance(page);
      table.touch(page);
      if (table.state(page) == PageState::kResident) continue;
      if (table.count(PageState::kResident) == kFrames) {
        const PageIndex victim = table.victims(1).at(0);
        table.begin_evict(victim);
        table.finish_evict(victim);
      }
      table.begin_load(page);
      table.finish_load(page);
      ++loads;
    }
  }
  // Belady's rule needs (W - R + 1) loads a pass and little more where the cycle does not divide;
  // least recently used would load all 16.
  EXPECT_LE(loads, (kPasses - 1) * (kPages - kFrames + 1));
}

}  // namespace
}  // namespace penstock
