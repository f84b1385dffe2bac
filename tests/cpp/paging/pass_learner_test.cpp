// What is expected after passes of every sort: that repeat, differ, end early, take another path.
#include "paging/pass_learner.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <random>
#include <vector>

namespace penstock {
namespace {

using Order = std::vector<StepId>;

Order steps_between(StepId first, StepId last) {
  Order order(last - first);
  std::iota(order.begin(), order.end(), first);
  return order;
}

Order joined(Order one, const Order& other) {
  one.insert(one.end(), other.begin(), other.end());
  return one;
}

const Order& known(const PassLearner& learner, StepId first) {
  static const Order none;
  const Order* found = learner.known(first);
  return found == nullptr ? none : *found;
}

TEST(PassLearner, NothingIsKnownOfAKindThatNeverCame) {
  PassLearner learner;
  EXPECT_EQ(learner.known(0), nullptr);
  EXPECT_FALSE(learner.learn({}));
  EXPECT_TRUE(learner.learn({3, 4}));
  EXPECT_EQ(learner.known(0), nullptr);
  EXPECT_EQ(learner.known(4), nullptr);
}

TEST(PassLearner, FirstPassIsTheOrder) {
  PassLearner learner;
  EXPECT_TRUE(learner.learn({0, 1, 1, 2, 0}));
  EXPECT_EQ(known(learner, 0), (Order{0, 1, 1, 2, 0}));
  EXPECT_FALSE(learner.learn({0, 1, 1, 2, 0}));
  EXPECT_EQ(known(learner, 0), (Order{0, 1, 1, 2, 0}));
}

TEST(PassLearner, KindsAreToldByTheirFirstStep) {
  PassLearner learner;
  EXPECT_TRUE(learner.learn({0, 1, 2}));
  EXPECT_TRUE(learner.learn({5, 1, 2, 3}));
  EXPECT_FALSE(learner.learn({0, 1, 2}));
  EXPECT_FALSE(learner.learn({5, 1, 2, 3}));
  EXPECT_EQ(known(learner, 0), (Order{0, 1, 2}));
  EXPECT_EQ(known(learner, 5), (Order{5, 1, 2, 3}));
}

TEST(PassLearner, WhatComesTwiceInARowIsTheOrder) {
  PassLearner learner;
  learner.learn(steps_between(0, 10));
  Order longer = steps_between(0, 10);
  longer.insert(longer.begin() + 4, {20, 21});
  EXPECT_FALSE(learner.learn(longer));  // nothing was lacking
  EXPECT_EQ(known(learner, 0), steps_between(0, 10));
  EXPECT_TRUE(learner.learn(longer));
  EXPECT_EQ(known(learner, 0), longer);
  const Order shorter = steps_between(0, 3);
  EXPECT_FALSE(learner.learn(shorter));
  EXPECT_TRUE(learner.learn(shorter));
  EXPECT_EQ(known(learner, 0), shorter);
}

TEST(PassLearner, RepeatsOfOneKindAreNotBrokenByAnother) {
  PassLearner learner;
  learner.learn({0, 1, 2, 3});
  learner.learn({0, 1, 7, 2, 3});
  learner.learn({9, 1});
  EXPECT_TRUE(learner.learn({0, 1, 7, 2, 3}));
  EXPECT_EQ(known(learner, 0), (Order{0, 1, 7, 2, 3}));
}

TEST(PassLearner, ExpertsThatDifferEachPassLeaveTheCommonSteps) {
  std::mt19937 random(1);
  PassLearner learner;
  Order common;
  for (StepId layer = 0; layer < 8; ++layer) common.push_back(layer * 100);
  const auto pass = [&] {
    Order steps;
    for (const StepId step : common) {
      steps.push_back(step);
      steps.push_back(step + 1 + static_cast<StepId>(random() % 64));  // one of many experts
    }
    return steps;
  };
  learner.learn(pass());
  for (int i = 0; i < 20; ++i) learner.learn(pass());
  const Order& order = known(learner, 0);
  Order kept;
  for (const StepId step : order) {
    if (step % 100 == 0) kept.push_back(step);
  }
  EXPECT_EQ(kept, common);
  EXPECT_LE(order.size(), common.size() + 2);  // an expert that came by chance
  int changes = 0;
  for (int i = 0; i < 20; ++i) changes += learner.learn(pass()) ? 1 : 0;
  EXPECT_LE(changes, 2);  // it is not planned anew with every pass
}

TEST(PassLearner, StepIsDroppedOnlyWhenTwoPassesInARowLackIt) {
  PassLearner learner;
  const Order full = steps_between(0, 12);
  learner.learn(full);
  Order lacks_five = full;
  lacks_five.erase(lacks_five.begin() + 5);
  Order lacks_six = full;
  lacks_six.erase(lacks_six.begin() + 6);
  for (int i = 0; i < 4; ++i) {
    EXPECT_FALSE(learner.learn(lacks_five));
    EXPECT_FALSE(learner.learn(lacks_six));
    EXPECT_EQ(known(learner, 0), full);
  }
  Order lacks_both = lacks_six;
  lacks_both.erase(lacks_both.begin() + 5);
  EXPECT_TRUE(learner.learn(lacks_both));  // six is lacked the second time
  EXPECT_EQ(known(learner, 0), lacks_six);
}

TEST(PassLearner, EarlyExitsBetweenFullPassesKeepTheFullOrder) {
  const Order full = steps_between(0, 20);
  for (const StepId exit : {1U, 5U, 9U, 10U, 15U, 19U}) {
    PassLearner learner;
    learner.learn(full);
    for (int i = 0; i < 5; ++i) {
      EXPECT_FALSE(learner.learn(steps_between(0, exit))) << exit;
      EXPECT_EQ(known(learner, 0), full) << exit;
      EXPECT_FALSE(learner.learn(full)) << exit;
      EXPECT_EQ(known(learner, 0), full) << exit;
    }
  }
}

TEST(PassLearner, EarlyExitsAtVariousPlacesInARowKeepWhatOneOfThemHad) {
  PassLearner learner;
  const Order full = steps_between(0, 20);
  learner.learn(full);
  EXPECT_FALSE(learner.learn(steps_between(0, 12)));
  EXPECT_TRUE(learner.learn(steps_between(0, 15)));  // both lacked what comes after 15
  EXPECT_EQ(known(learner, 0), steps_between(0, 15));
  EXPECT_FALSE(learner.learn(full));
  EXPECT_TRUE(learner.learn(full));
  EXPECT_EQ(known(learner, 0), full);
}

TEST(PassLearner, PassThatWasCutShortChangesNothing) {
  PassLearner learner;
  const Order full = steps_between(0, 20);
  learner.learn(full);
  for (const StepId end : {1U, 2U, 10U, 19U}) {
    EXPECT_FALSE(learner.learn(steps_between(0, end)));
    EXPECT_EQ(known(learner, 0), full);
    EXPECT_FALSE(learner.learn(full));
  }
  learner.learn({0, 1});
  learner.learn({0});  // two in a row that lack most
  learner.learn(full);
  EXPECT_TRUE(learner.learn(full));
  EXPECT_EQ(known(learner, 0), full);
}

TEST(PassLearner, UnlikePathReplacesTheOrder) {
  PassLearner learner;
  learner.learn(joined({0}, steps_between(100, 120)));
  const Order other = joined({0}, steps_between(200, 220));
  EXPECT_TRUE(learner.learn(other));
  EXPECT_EQ(known(learner, 0), other);
  const Order half = joined(joined({0}, steps_between(200, 211)), steps_between(300, 309));
  EXPECT_FALSE(learner.learn(half));  // enough in common
  EXPECT_EQ(known(learner, 0), other);
}

// ---- common subsequences -----------------------------------------------------------------------

// By dynamic programming.
std::size_t longest_common(const Order& a, const Order& b) {
  std::vector<std::vector<std::size_t>> best(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      best[i][j] =
          a[i - 1] == b[j - 1] ? best[i - 1][j - 1] + 1 : std::max(best[i - 1][j], best[i][j - 1]);
    }
  }
  return best[a.size()][b.size()];
}

bool is_subsequence(const Order& part, const Order& whole) {
  std::size_t found = 0;
  for (const StepId step : whole) {
    if (found < part.size() && part[found] == step) ++found;
  }
  return found == part.size();
}

TEST(CommonPlaces, AreThoseOfALongestCommonSubsequence) {
  std::mt19937 random(7);
  for (int round = 0; round < 3000; ++round) {
    const StepId kinds = 1 + static_cast<StepId>(random() % 12);
    const auto sequence = [&] {
      Order steps(random() % 30);
      for (StepId& step : steps) step = static_cast<StepId>(random() % kinds);
      return steps;
    };
    const Order order = sequence();
    const Order pass = sequence();
    const std::vector<std::size_t> places = common_places(order, pass);
    ASSERT_EQ(places.size(), longest_common(order, pass)) << "round " << round;
    ASSERT_EQ(std::adjacent_find(places.begin(), places.end(), std::greater_equal<>()),
              places.end());
    Order common;
    for (const std::size_t place : places) common.push_back(order.at(place));
    ASSERT_TRUE(is_subsequence(common, pass)) << "round " << round;
  }
}

TEST(CommonPlaces, OfEqualAndUnlikeSequences) {
  const Order order = {4, 4, 2, 4};
  EXPECT_EQ(common_places(order, order), (std::vector<std::size_t>{0, 1, 2, 3}));
  EXPECT_TRUE(common_places(order, {1, 3}).empty());
  EXPECT_TRUE(common_places(order, {}).empty());
  EXPECT_TRUE(common_places({}, order).empty());
}

}  // namespace
}  // namespace penstock
