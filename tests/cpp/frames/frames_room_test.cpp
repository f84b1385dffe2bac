// What a region of frames gives to others who need room under the cap, and what it keeps.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "support/frames_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;

/// Takes frames for something else, as an allocator does.
std::vector<Frame> take(const FramePool& pool, std::size_t count) {
  std::vector<Frame> frames;
  while (frames.size() < count) {
    std::optional<Frame> frame = pool.try_take(Tag::kActivations);
    if (!frame && pool.make_room(pool.frame_size(), nullptr)) continue;
    if (!frame) break;
    frames.push_back(std::move(*frame));
  }
  return frames;
}

TEST(FramesRoom, PagesThatAreNeededLastGoFirst) {
  FramesSetup setup(6, 8);
  setup.region->arrange(arranged(8, 4, 2));
  setup.region->set_schedule({{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}});
  for (PageIndex page = 0; page < 4; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  setup.region->advance(0);
  setup.region->advance(1);  // comes again last of all, and 0 before it
  const auto frames = take(*setup.pool, 2);
  EXPECT_EQ(frames.size(), 2U);
  EXPECT_EQ(setup.region->frame_count(), 4U);
  const auto before = setup.loads();
  EXPECT_TRUE(reads_right(setup, {2, 3}));
  EXPECT_EQ(setup.loads(), before);
  for (PageIndex page = 0; page < 8; ++page) EXPECT_TRUE(reads_right(setup, {page}));
  EXPECT_EQ(setup.used_pages(), 6U);
}

TEST(FramesRoom, PagesInUseStay) {
  FramesSetup setup(4, 6);
  setup.region->arrange(arranged(6, 3, 1));
  setup.region->begin({0, 1, 3}, kCaller);
  EXPECT_EQ(take(*setup.pool, 4).size(), 1U);
  for (const PageIndex page : {0U, 1U, 3U}) {
    EXPECT_TRUE(right_now(*setup.region, setup.bytes, page));
  }
  setup.region->end({0, 1, 3}, kCaller);
  EXPECT_TRUE(reads_right(setup, {2}));
}

TEST(FramesRoom, RingShrinksToWhatTheLargestStepNeeds) {
  FramesSetup setup(7, 12);
  setup.region->arrange(arranged(12, 2, 5));
  setup.region->set_schedule({{0, 1}, {2, 3, 4}, {5, 6}, {7, 8, 9}, {10}, {11}});
  const auto frames = take(*setup.pool, 7);
  EXPECT_EQ(frames.size(), 4U);
  EXPECT_EQ(setup.region->frame_count(), 3U);
  for (const Pages& step : {Pages{2, 3, 4}, Pages{7, 8, 9}, Pages{0, 1}, Pages{11}}) {
    EXPECT_TRUE(reads_right(setup, step));
  }
  setup.region->arrange(arranged(12, 0, 3));
  for (PageIndex page = 0; page < 12; ++page) EXPECT_TRUE(reads_right(setup, {page}));
}

TEST(FramesRoom, ModelThatNobodyUsesGivesAllBeforeOthersGiveAnything) {
  FramesSetup setup(8, 4);
  const auto tier = std::make_shared<FakeTier>(setup.bytes, kPage);
  const auto idle = FramesRegion::create(setup.pool, tier);
  for (const auto& region : {setup.region, idle}) region->arrange(arranged(4, 4, 0));
  idle->set_active(false);
  auto frames = take(*setup.pool, 3);
  EXPECT_EQ(idle->frame_count(), 1U);
  EXPECT_EQ(setup.region->frame_count(), 4U);
  const auto more = take(*setup.pool, 2);
  EXPECT_EQ(idle->frame_count(), 0U);
  EXPECT_EQ(setup.region->frame_count(), 3U);
  frames.clear();
  idle->set_active(true);
  idle->arrange(arranged(4, 2, 1));
  idle->begin({0}, kCaller);
  EXPECT_TRUE(right_now(*idle, setup.bytes, 0));
  idle->end({0}, kCaller);
}

TEST(FramesRoom, StepThatLacksFramesTakesThoseThatOthersCanDoWithout) {
  FramesSetup setup(6, 6);
  const auto tier = std::make_shared<FakeTier>(setup.bytes, kPage);
  const auto other = FramesRegion::create(setup.pool, tier);
  other->arrange(arranged(6, 3, 1));
  other->begin({0}, kCaller);
  setup.region->arrange(arranged(6, 0, 2));
  EXPECT_TRUE(reads_right(setup, {1, 3, 5}));  // on one slot, and all frames are taken
  EXPECT_EQ(other->frame_count(), 3U);
  EXPECT_TRUE(right_now(*other, setup.bytes, 0));
  EXPECT_THROW(setup.region->begin({0, 1, 2, 3, 4, 5}, kCaller), CapExceededError);
  EXPECT_EQ(setup.region->stats().pinned_pages, 0U);
  other->end({0}, kCaller);
  EXPECT_LE(setup.budget->stats().peak, setup.budget->cap());
}

TEST(FramesRoom, NothingIsTakenFromWhatIsProtected) {
  FramesSetup setup(4, 4);
  setup.region->arrange(arranged(4, 3, 1));
  setup.region->set_protected(true);
  setup.region->set_active(false);
  EXPECT_TRUE(take(*setup.pool, 1).empty());
  setup.region->set_protected(false);
  EXPECT_EQ(take(*setup.pool, 1).size(), 1U);
}

TEST(FramesRoom, FailureOfTheDeviceLeavesWhatCouldNotGo) {
  FramesSetup setup(4, 4);
  setup.region->arrange(arranged(4, 4, 0));
  setup.device->fail_nth_call_of("unmap", 1);
  EXPECT_TRUE(take(*setup.pool, 3).size() <= 1U);  // the source is on record as failed
  EXPECT_EQ(take(*setup.pool, 3).size(), 3U);
  EXPECT_EQ(setup.region->frame_count(), 1U);
  EXPECT_TRUE(reads_right(setup, {3}));
}

TEST(FramesRoom, BytesAreRightWhileOthersTakeAndGiveBack) {
  FramesSetup setup(9, 24);
  setup.region->arrange(arranged(24, 5, 4));
  std::vector<Pages> steps;
  for (PageIndex page = 0; page < 24; page += 2) steps.push_back({page, page + 1});
  setup.region->set_schedule(steps);
  LateLook look(setup.bytes);
  std::atomic<bool> over{false};
  std::thread taker([&] {
    std::minstd_rand random(7);
    while (!over) {
      auto frames = take(*setup.pool, random() % 7 + 1);
      std::this_thread::sleep_for(microseconds(random() % 300));
    }
  });
  const ReaderStream stream(setup);
  for (int pass = 0; pass < 30; ++pass) {
    for (StepIndex step = 0; step < steps.size(); ++step) {
      setup.region->advance(step);
      setup.region->begin(steps[step], stream.get());
      look.look(*setup.region, steps[step], stream.get(), microseconds(50));
      setup.region->end(steps[step], stream.get());
      setup.region->load_ahead(steps[(step + 1) % steps.size()]);
    }
  }
  over = true;
  taker.join();
  setup.spy->stream_synchronize(stream.get());
  EXPECT_EQ(look.looks(), 30 * 24);
  EXPECT_EQ(look.wrong(), 0);
  setup.region->evict(steps.front());
  EXPECT_LE(setup.budget->stats().peak, setup.budget->cap());
}

}  // namespace
}  // namespace penstock
