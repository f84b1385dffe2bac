// What the functions of the paging API do: models are found by address, operations may touch
// several and nest, and nothing stays held where one of them fails.
#include "paging/paged_models.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/child.hpp"
#include "support/paged_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;

/// A model that can be found.
struct KnownModel : PagedSetup {
  KnownModel(std::size_t cap_pages, std::size_t page_count) : PagedSetup(cap_pages, page_count) {
    PagedModels::get().add(model);
  }
  std::size_t in_use() const { return region->stats().pinned_pages; }
};

HeldOperation* begin(const char* name, const std::vector<PagingRange>& ranges) {
  return PagedModels::get().begin(operation(name), ranges.data(), ranges.size());
}

std::size_t part_bytes(const std::vector<PagingRange>& ranges) {
  return PagedModels::get().part_bytes(ranges.data(), ranges.size());
}

std::vector<PagingRange> joined(std::vector<PagingRange> one,
                                const std::vector<PagingRange>& other) {
  one.insert(one.end(), other.begin(), other.end());
  return one;
}

TEST(PagedModels, FindsModelsByAddress) {
  KnownModel one(8, 4);
  KnownModel two(8, 4);
  KnownModel three(8, 4);
  for (KnownModel* model : {&two, &one, &three}) {
    for (const std::size_t offset : {std::size_t{0}, 2 * kPage + 77, 4 * kPage - 1}) {
      HeldOperation* held = begin(kMm, {model->range(offset, 1)});
      ASSERT_NE(held, nullptr);
      for (KnownModel* each : {&one, &two, &three}) {
        EXPECT_EQ(each->in_use(), each == model ? 1U : 0U);
      }
      const auto page = static_cast<PageIndex>(offset / kPage);
      EXPECT_TRUE(right_now(*model->region, model->bytes, page));
      PagedModels::end(held);
      EXPECT_EQ(model->in_use(), 0U);
    }
  }
}

TEST(PagedModels, LeavesOtherAddressesAlone) {
  KnownModel model(4, 4);
  int local = 0;
  EXPECT_EQ(begin(kMm, {{&local, sizeof(local), true}}), nullptr);
  EXPECT_EQ(begin(kMm, {{nullptr, 4, false}}), nullptr);
  EXPECT_EQ(begin(kMm, {}), nullptr);
  EXPECT_EQ(begin(kMm, {model.range(kPage, 0)}), nullptr);
  EXPECT_EQ(begin(kMm, {{model.region->address() + 4 * kPage, 1, false}}), nullptr);
  EXPECT_EQ(begin(kMm, {{model.region->address() - 1, 1, false}}), nullptr);
  EXPECT_EQ(part_bytes({{&local, sizeof(local), false}}), std::numeric_limits<std::size_t>::max());
  HeldOperation* held = begin(kMm, {{&local, sizeof(local), true}, model.range(0, 8)});
  ASSERT_NE(held, nullptr);
  EXPECT_EQ(model.in_use(), 1U);
  PagedModels::end(held);
}

TEST(PagedModels, OneOperationMayTouchSeveral) {
  KnownModel one(4, 4);
  KnownModel two(4, 4);
  const std::vector<PagingRange> ranges = {one.range(0, 8), two.range(kPage, 8, true),
                                           one.range(2 * kPage, 8, true), two.range(0, 8),
                                           one.range(3 * kPage, 8)};
  HeldOperation* held = begin(kAdd, ranges);
  ASSERT_NE(held, nullptr);
  EXPECT_EQ(one.in_use(), 3U);
  EXPECT_EQ(two.in_use(), 2U);
  EXPECT_EQ(one.streamer->stats().steps, 1U);
  EXPECT_EQ(two.streamer->stats().steps, 1U);
  std::memset(two.region->address() + kPage, 5, 8);
  std::memset(two.bytes.data() + kPage, 5, 8);
  std::memset(one.region->address() + 2 * kPage, 6, 8);
  std::memset(one.bytes.data() + 2 * kPage, 6, 8);
  PagedModels::end(held);
  for (KnownModel* model : {&one, &two}) {
    EXPECT_EQ(model->in_use(), 0U);
    model->region->evict(pages_between(0, 4));
    EXPECT_EQ(model->region->frames_stats().written_back_bytes, kPage);
    EXPECT_TRUE(model->tier->bytes() == model->bytes);
  }
}

TEST(PagedModels, FailureOfTheSecondLetsGoOfTheFirst) {
  KnownModel one(4, 4);
  KnownModel two(1, 4);
  const auto ranges = joined(one.ranges({0, 1}), two.ranges({0, 1}));
  EXPECT_THROW(begin(kAdd, ranges), CapExceededError);
  EXPECT_EQ(one.in_use(), 0U);
  EXPECT_EQ(two.in_use(), 0U);
  HeldOperation* held = begin(kAdd, one.ranges({0, 1}));
  ASSERT_NE(held, nullptr);  // it is not held by what failed
  EXPECT_EQ(one.in_use(), 2U);
  PagedModels::end(held);
  const auto fetches = two.tier->fetches();
  two.tier->writable = false;
  EXPECT_THROW(begin(kAdd, joined(one.ranges({0}, true), two.ranges({0}, true))), ModelError);
  EXPECT_EQ(one.in_use(), 0U);
  EXPECT_EQ(two.tier->fetches(), fetches);
}

// ---- nesting -----------------------------------------------------------------------------------

TEST(PagedModels, NestedOperationsHoldOnce) {
  KnownModel model(4, 4);
  HeldOperation* outer = begin(kAdd, model.ranges({0, 1}));
  EXPECT_EQ(begin(kMm, model.ranges({0})), nullptr);
  EXPECT_EQ(begin(kMm, {model.range(kPage + 5, 20)}), nullptr);
  EXPECT_EQ(model.streamer->stats().steps, 1U);
  HeldOperation* inner = begin(kMm, model.ranges({1, 2}));
  ASSERT_NE(inner, nullptr);
  EXPECT_EQ(begin(kMm, model.ranges({0})), nullptr);  // by the outermost
  EXPECT_EQ(begin(kMm, model.ranges({2})), nullptr);
  EXPECT_EQ(model.streamer->stats().steps, 2U);
  EXPECT_EQ(model.in_use(), 3U);
  PagedModels::end(inner);
  EXPECT_EQ(model.in_use(), 2U);
  HeldOperation* again = begin(kMm, model.ranges({2}));
  ASSERT_NE(again, nullptr);
  PagedModels::end(again);
  PagedModels::end(outer);
  EXPECT_EQ(model.in_use(), 0U);
  again = begin(kMm, model.ranges({0}));
  ASSERT_NE(again, nullptr);
  PagedModels::end(again);
}

TEST(PagedModels, OtherThreadsDoNotHoldForThisOne) {
  KnownModel model(4, 4);
  HeldOperation* outer = begin(kAdd, model.ranges({0}));
  Running other([&] {
    HeldOperation* held = begin(kMm, model.ranges({0}));
    EXPECT_NE(held, nullptr);
    EXPECT_THROW(PagedModels::end(outer), ScheduleError);
    if (held != nullptr) PagedModels::end(held);
  });
  other.join();
  EXPECT_EQ(model.in_use(), 1U);
  PagedModels::end(outer);
  EXPECT_THROW(PagedModels::end(outer), ScheduleError);
}

TEST(PagedModels, OperationsMayEndInAnyOrder) {
  KnownModel model(4, 4);
  HeldOperation* one = begin(kAdd, model.ranges({0}));
  HeldOperation* two = begin(kAdd, model.ranges({1}));
  HeldOperation* three = begin(kAdd, model.ranges({2}));
  PagedModels::end(two);
  EXPECT_EQ(model.in_use(), 2U);
  PagedModels::end(one);
  EXPECT_EQ(model.in_use(), 1U);
  EXPECT_EQ(begin(kMm, model.ranges({2})), nullptr);
  PagedModels::end(three);
  EXPECT_EQ(model.in_use(), 0U);
}

TEST(PagedModels, WriteInsideARead) {
  KnownModel model(4, 4);
  HeldOperation* outer = begin(kAdd, model.ranges({0, 1}));
  HeldOperation* inner = begin(kCopy, {model.range(kPage, 8, true)});
  ASSERT_NE(inner, nullptr);  // it has to be noted
  EXPECT_EQ(begin(kMm, {model.range(kPage, 8)}), nullptr);
  EXPECT_EQ(begin(kCopy, {model.range(kPage + 2, 4, true)}), nullptr);
  std::memset(model.region->address() + kPage, 5, 8);
  std::memset(model.bytes.data() + kPage, 5, 8);
  PagedModels::end(inner);
  PagedModels::end(outer);
  model.region->evict(pages_between(0, 4));
  EXPECT_TRUE(model.tier->bytes() == model.bytes);
  EXPECT_EQ(model.region->frames_stats().written_back_bytes, kPage);
}

TEST(PagedModels, ReadInsideAWriteIsHeldByIt) {
  KnownModel model(4, 4);
  HeldOperation* outer = begin(kCopy, model.ranges({0}, true));
  EXPECT_EQ(begin(kMm, model.ranges({0})), nullptr);
  PagedModels::end(outer);
}

// ---- parts of lists ----------------------------------------------------------------------------

TEST(PagedModels, PartsAreTheSmallestThatAModelWants) {
  KnownModel one(4, 4);
  KnownModel two(4, 4);
  one.model->set_room(16 * kPage);
  two.model->set_room(4 * kPage);
  constexpr std::size_t kWhole = std::numeric_limits<std::size_t>::max();
  EXPECT_EQ(part_bytes(one.ranges({0, 1, 2, 3})), kWhole);
  EXPECT_EQ(part_bytes(two.ranges({0, 1})), kWhole);
  EXPECT_EQ(part_bytes(two.ranges({0, 1, 2})), kPage / 2);
  EXPECT_EQ(part_bytes(joined(one.ranges({0, 1, 2, 3}), two.ranges({0, 1, 2}))), kPage / 2);
  one.model->set_room(7 * kPage);
  two.model->set_room(kWhole);
  EXPECT_EQ(part_bytes(joined(two.ranges({0}), one.ranges({0, 1, 2, 3}))), 7 * kPage / 8);
}

// ---- models that go, and children --------------------------------------------------------------

TEST(PagedModels, ModelThatHasGoneIsNotFound) {
  auto model = std::make_unique<KnownModel>(4, 4);
  const std::vector<PagingRange> ranges = model->ranges({1});
  model.reset();
  EXPECT_EQ(begin(kMm, ranges), nullptr);
  KnownModel other(4, 4);  // perhaps at the same address
  HeldOperation* held = begin(kMm, other.ranges({1}));
  ASSERT_NE(held, nullptr);
  PagedModels::end(held);
}

TEST(PagedModels, ModelLivesAsLongAsWhatHoldsIt) {
  KnownModel setup(4, 4);
  const std::weak_ptr<PagedModel> model = setup.model;
  HeldOperation* held = begin(kMm, setup.ranges({0}));
  setup.model.reset();
  EXPECT_FALSE(model.expired());
  PagedModels::end(held);
  EXPECT_TRUE(model.expired());
  EXPECT_EQ(setup.in_use(), 0U);
  EXPECT_EQ(begin(kMm, setup.ranges({0})), nullptr);
}

TEST(PagedModels, ForkedChildIsRefusedAndTheParentUntouched) {
  KnownModel model(4, 4);
  model.run_each({0, 1});
  const auto steps = model.streamer->stats().steps;
  const ChildEnd child = run_in_child([&] {
    try {
      begin(kMm, model.ranges({0}));
      return 1;
    } catch (const ModelError& error) {
      if (std::string(error.what()).find("forked") == std::string::npos) return 2;
    }
    try {
      part_bytes(model.ranges({0}));
      return 3;
    } catch (const ModelError&) {
    }
    int local = 0;
    if (begin(kMm, {{&local, sizeof(local), false}}) != nullptr) return 4;
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
  EXPECT_EQ(model.in_use(), 0U);
  EXPECT_EQ(model.streamer->stats().steps, steps);
  HeldOperation* held = begin(kMm, model.ranges({0, 3}));
  ASSERT_NE(held, nullptr);
  EXPECT_TRUE(right_now(*model.region, model.bytes, 0));
  EXPECT_TRUE(right_now(*model.region, model.bytes, 3));
  PagedModels::end(held);
}

#ifndef __SANITIZE_THREAD__  // it allows no new threads in a forked child
TEST(PagedModels, ForkedChildMayHaveItsOwn) {
  KnownModel model(4, 4);
  model.run_each({0, 1});
  const ChildEnd child = run_in_child([] {
    KnownModel own(4, 4);
    HeldOperation* held = begin(kMm, own.ranges({2}));
    if (held == nullptr || !right_now(*own.region, own.bytes, 2)) return 1;
    PagedModels::end(held);
    return 0;
  });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
}
#endif

TEST(PagedModels, ForkedChildMayUseTheAddressesOfAModelThatHadGone) {
  auto model = std::make_unique<KnownModel>(4, 4);
  const std::vector<PagingRange> ranges = model->ranges({1});
  model.reset();
  const ChildEnd child = run_in_child([&] { return begin(kMm, ranges) == nullptr ? 0 : 1; });
  EXPECT_EQ(child.signal, 0);
  EXPECT_EQ(child.exit_code, 0);
}

TEST(PagedModels, ThreadsUseSeveralModelsWhileOthersComeAndGo) {
  KnownModel one(3, 8);
  KnownModel two(3, 8);
  std::vector<std::unique_ptr<Running>> threads;
  for (PageIndex first = 0; first < 3; ++first) {
    threads.push_back(std::make_unique<Running>([&, first] {
      for (PageIndex i = 0; i < 100; ++i) {
        const PageIndex page = (first * 3 + i) % 8;
        HeldOperation* held = begin(kMm, joined(one.ranges({page}), two.ranges({page})));
        ASSERT_NE(held, nullptr);
        EXPECT_TRUE(right_now(*one.region, one.bytes, page));
        EXPECT_TRUE(right_now(*two.region, two.bytes, page));
        PagedModels::end(held);
      }
    }));
  }
  for (int round = 0; round < 20; ++round) {
    KnownModel other(2, 2);
    HeldOperation* held = begin(kMm, other.ranges({0, 1}));
    ASSERT_NE(held, nullptr);
    PagedModels::end(held);
  }
  for (const auto& thread : threads) EXPECT_NO_THROW(thread->join());
  EXPECT_EQ(one.in_use() + two.in_use(), 0U);
}

}  // namespace
}  // namespace penstock
