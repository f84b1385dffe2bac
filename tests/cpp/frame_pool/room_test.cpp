// Who is asked for room, in which order, and that asking never waits for itself.
#include "frame_pool/room.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device/host/host_device.hpp"
#include "error/error.hpp"
#include "frame_pool/frame_pool.hpp"
#include "support/pager_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

class FakeSource : public RoomSource {
 public:
  FakeSource(Budget& budget, std::size_t holds) : budget_(budget), holds_(holds) {
    budget.charge(Tag::kWeights, holds);
  }
  ~FakeSource() override { budget_.release(Tag::kWeights, holds_); }

  std::size_t give_back(std::size_t nbytes) override {
    asked.push_back(nbytes);
    if (on_ask) on_ask();
    const std::size_t given = std::min(nbytes, holds_);
    holds_ -= given;
    budget_.release(Tag::kWeights, given);
    return given;
  }

  std::vector<std::size_t> asked;
  std::function<void()> on_ask;

 private:
  Budget& budget_;
  std::size_t holds_;
};

struct RoomSetup {
  std::shared_ptr<FakeSource> add(std::size_t pages, RoomRank rank) {
    auto source = std::make_shared<FakeSource>(*budget, pages * kPage);
    pool->add_source(source, rank);
    return source;
  }
  std::shared_ptr<HostDevice> device = std::make_shared<HostDevice>();
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(8 * kPage);
  std::shared_ptr<FramePool> pool = FramePool::create(device, budget, kPage);
};

using Sizes = std::vector<std::size_t>;

TEST(Room, SourcesAreAskedByRankForWhatIsMissing) {
  RoomSetup setup;
  const auto ring = setup.add(2, RoomRank::kRing);
  const auto resident = setup.add(3, RoomRank::kResidentSet);
  const auto cached = setup.add(1, RoomRank::kCachedFrames);
  const auto overflow = setup.add(1, RoomRank::kOverflow);
  EXPECT_TRUE(setup.pool->make_room(kPage, nullptr));  // is there
  EXPECT_TRUE(cached->asked.empty());
  EXPECT_TRUE(setup.pool->make_room(6 * kPage, nullptr));
  EXPECT_EQ(cached->asked, Sizes{5 * kPage});
  EXPECT_EQ(resident->asked, Sizes{4 * kPage});
  EXPECT_EQ(ring->asked, Sizes{kPage});
  EXPECT_TRUE(overflow->asked.empty());
}

TEST(Room, AskerAndThoseWhoAreGoneAreNotAsked) {
  RoomSetup setup;
  const auto asker = setup.add(4, RoomRank::kCachedFrames);
  auto gone = setup.add(2, RoomRank::kResidentSet);
  const auto other = setup.add(2, RoomRank::kRing);
  gone.reset();
  EXPECT_FALSE(setup.pool->make_room(8 * kPage, asker.get()));
  EXPECT_TRUE(asker->asked.empty());
  EXPECT_EQ(other->asked, Sizes{6 * kPage});
  EXPECT_EQ(setup.budget->available(), 4 * kPage);
}

TEST(Room, SourceThatFailsIsPassedOverAndOnRecord) {
  RoomSetup setup;
  const auto broken = setup.add(4, RoomRank::kCachedFrames);
  const auto other = setup.add(4, RoomRank::kRing);
  broken->on_ask = [] { throw DeviceError("unmap", 1, "broken"); };
  EXPECT_TRUE(setup.pool->make_room(2 * kPage, nullptr));
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
}

TEST(Room, SourceThatAsksWhileItGivesIsNotAskedAgain) {
  RoomSetup setup;
  const auto first = setup.add(4, RoomRank::kCachedFrames);
  const auto second = setup.add(4, RoomRank::kRing);
  std::mutex mine;
  first->on_ask = [&] {
    const std::lock_guard lock(mine);  // would not be free a second time
    EXPECT_TRUE(setup.pool->make_room(kPage, first.get()));
  };
  second->on_ask = [&] { EXPECT_FALSE(setup.pool->make_room(8 * kPage, nullptr)); };
  EXPECT_TRUE(setup.pool->make_room(5 * kPage, nullptr));
  EXPECT_EQ(first->asked.size(), 1U);
  EXPECT_EQ(second->asked.size(), 1U);
}

}  // namespace
}  // namespace penstock
