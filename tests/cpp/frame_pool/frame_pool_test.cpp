#include "frame_pool/frame_pool.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device/testing/faulty_device.hpp"
#include "error/error.hpp"
#include "support/pager_setup.hpp"
#include "support/spying_device.hpp"

namespace penstock {
namespace {

using namespace testing;

struct PoolSetup {
  explicit PoolSetup(std::size_t cap_pages)
      : budget(std::make_shared<Budget>(cap_pages * kPage)),
        pool(FramePool::create(device, budget, kPage)) {}
  std::size_t used(Tag tag) const {
    return budget->stats().used_by_tag.at(static_cast<std::size_t>(tag));
  }

  std::shared_ptr<SpyingDevice> spy = std::make_shared<SpyingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(spy);
  std::shared_ptr<Budget> budget;
  std::shared_ptr<FramePool> pool;
};

TEST(FramePool, ChargesTheTagAndGivesItBackWithTheFrame) {
  PoolSetup setup(4);
  {
    const auto weights = setup.pool->try_take(Tag::kWeights);
    const auto cache = setup.pool->try_take(Tag::kCache);
    ASSERT_TRUE(weights && cache);
    EXPECT_TRUE(*weights);
    EXPECT_NE(weights->handle().value, cache->handle().value);
    EXPECT_EQ(setup.used(Tag::kWeights), kPage);
    EXPECT_EQ(setup.used(Tag::kCache), kPage);
    EXPECT_EQ(setup.spy->frames(), 2);
  }
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.spy->frames(), 0);
}

TEST(FramePool, RefusesAtTheCapWithoutAskingTheDevice) {
  PoolSetup setup(2);
  std::vector<std::optional<Frame>> frames;
  for (int i = 0; i < 2; ++i) frames.push_back(setup.pool->try_take(Tag::kWeights));
  EXPECT_FALSE(setup.pool->try_take(Tag::kWeights));
  EXPECT_EQ(setup.device->calls()["frame_create"], 2U);
  frames.pop_back();
  EXPECT_TRUE(setup.pool->try_take(Tag::kWeights));
}

TEST(FramePool, FrameThatCannotBeMadeIsNotCharged) {
  PoolSetup setup(2);
  setup.device->fail_nth_call_of("frame_create", 0);
  EXPECT_THROW(setup.pool->try_take(Tag::kWeights), DeviceError);
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_TRUE(setup.pool->try_take(Tag::kWeights));
}

TEST(FramePool, ReleaseThatFailsIsOnRecordAndTheChargeIsGivenBack) {
  PoolSetup setup(2);
  setup.device->fail_nth_call_of("frame_release", 0);
  setup.pool->try_take(Tag::kWeights);
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST(FramePool, MovedFrameHasOneOwner) {
  PoolSetup setup(3);
  Frame first = std::move(*setup.pool->try_take(Tag::kWeights));
  const std::uint64_t value = first.handle().value;
  Frame second(std::move(first));
  EXPECT_FALSE(first);  // NOLINT(bugprone-use-after-move): that it is empty is the point
  EXPECT_EQ(second.handle().value, value);
  Frame third = std::move(*setup.pool->try_take(Tag::kCache));
  third = std::move(second);  // gives its own back
  EXPECT_EQ(third.handle().value, value);
  EXPECT_EQ(setup.used(Tag::kCache), 0U);
  EXPECT_EQ(setup.used(Tag::kWeights), kPage);
  Frame& same = third;
  third = std::move(same);
  EXPECT_EQ(third.handle().value, value);
  third = Frame();
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.spy->frames(), 0);
}

TEST(FramePool, FrameOutlivesItsPool) {
  PoolSetup setup(1);
  auto frame = setup.pool->try_take(Tag::kWeights);
  setup.pool.reset();
  EXPECT_EQ(setup.spy->frames(), 1);
  frame.reset();
  EXPECT_EQ(setup.spy->frames(), 0);
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST(FramePool, SizesThatFramesCannotHaveAreRefused) {
  PoolSetup setup(1);
  for (const std::size_t size : {std::size_t{0}, kPage / 2, 3 * kPage, kPage + 4096}) {
    EXPECT_THROW(FramePool::create(setup.device, setup.budget, size), std::invalid_argument);
  }
}

}  // namespace
}  // namespace penstock
