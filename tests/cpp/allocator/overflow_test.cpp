// Large requests that the cap has no room for, served from the host's memory within a limit.
#include "allocator/overflow.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr PoolId kPool{3, 0};

class OverflowTest : public ::testing::Test {
 protected:
  static constexpr std::size_t kLimit = 8 * kMiB;

  void SetUp() override { overflow().set_limit(kLimit); }
  Overflow& overflow() { return setup_.allocator->overflow(); }
  void* take(std::size_t nbytes, StreamHandle stream = kHere) {
    return setup_.take(nbytes, stream);
  }
  void drop(void* address) { setup_.allocator->free(address); }
  bool overflows(const void* address) { return overflow().find(address).has_value(); }

  AllocatorSetup setup_{2};
};

TEST_F(OverflowTest, WhatTheCapHasNoRoomForLiesOnTheHostAndIsCountedThere) {
  void* inside = take(2 * kFrame);
  EXPECT_FALSE(overflows(inside));
  auto* outside = static_cast<unsigned char*>(take(3 * kMiB));
  ASSERT_TRUE(overflows(outside));
  outside[0] = outside[3 * kMiB - 1] = 7;
  EXPECT_EQ(overflow().stats().live, 3 * kMiB);
  EXPECT_EQ(setup_.budget->stats().used, 2 * kFrame);
  const SideStats all = setup_.allocator->stats().side(Side::kAll);
  EXPECT_EQ(static_cast<std::size_t>(all.allocated_bytes.current), 2 * kFrame + 3 * kMiB);
  EXPECT_EQ(static_cast<std::size_t>(all.reserved_bytes.current), 2 * kFrame + 3 * kMiB);
  EXPECT_EQ(setup_.allocator->live_blocks().size(), 2U);
  EXPECT_EQ(setup_.allocator->find_block(outside)->requested, 3 * kMiB);
  drop(inside);
  drop(outside);
  EXPECT_THROW(drop(outside), std::invalid_argument);
  EXPECT_EQ(overflow().stats().live, 0U);
  EXPECT_EQ(overflow().stats().peak, 3 * kMiB);
  EXPECT_EQ(setup_.allocator->stats().side(Side::kAll).allocated_bytes.current, 0);
  setup_.allocator->empty_cache();
  EXPECT_EQ(overflow().stats().held, 0U);
  EXPECT_TRUE(setup_.balanced());
}

TEST_F(OverflowTest, RoomIsMadeFirst) {
  drop(take(2 * kFrame));
  const OwnedStream other(setup_.spy);
  void* block = take(2 * kFrame, other.get());
  EXPECT_FALSE(overflows(block));
  drop(block);
}

TEST_F(OverflowTest, OneThatIsLargerThanTheCapOverflows) {
  void* block = take(7 * kMiB);
  EXPECT_TRUE(overflows(block));
  EXPECT_EQ(setup_.used_frames(), 0U);
  drop(block);
}

TEST_F(OverflowTest, SmallRequestsAndThoseBeyondTheLimitAreRefused) {
  void* inside = take(2 * kFrame);
  EXPECT_THROW(take(kMiB - 1), CapExceededError);
  EXPECT_THROW(take(kLimit + 1), CapExceededError);
  void* most = take(kLimit);
  try {
    take(kMiB);
    FAIL() << "the limit is reached";
  } catch (const CapExceededError& error) {
    EXPECT_NE(std::string(error.what()).find("host's memory 8.00 MiB"), std::string::npos)
        << error.what();
  }
  overflow().set_limit(0);
  drop(most);
  EXPECT_THROW(take(kMiB), CapExceededError);
  drop(inside);
}

TEST(OverflowRoom, LargeRequestsLeaveSomeToSmallOnes) {
  AllocatorSetup setup(64);
  Overflow& overflow = setup.allocator->overflow();
  overflow.set_limit(8 * kMiB);
  std::vector<void*> large;
  while (overflow.stats().live == 0) large.push_back(setup.take(2 * kFrame));
  EXPECT_EQ(large.size(), 32U);  // the last of them overflows
  std::vector<void*> small;
  for (int i = 0; i < 1000; ++i) small.push_back(setup.take(1 + i % 512));
  EXPECT_LE(setup.used_frames(), 64U);
  // Where the host has no more, what is left is there for all.
  for (void* block : small) setup.allocator->free(block);
  large.push_back(setup.take(4 * kMiB));
  EXPECT_EQ(overflow.stats().live, 8 * kMiB);
  large.push_back(setup.take(2 * kFrame));
  EXPECT_EQ(setup.used_frames(), 64U);
  EXPECT_THROW(setup.take(kMiB), CapExceededError);
  for (void* block : large) setup.allocator->free(block);
  setup.allocator->empty_cache();
  EXPECT_TRUE(setup.balanced());
  EXPECT_EQ(setup.used_frames(), 0U);
}

TEST_F(OverflowTest, FreedMemoryServesItsStreamAtOnceAndOthersWhenItsWorkIsOver) {
  const OwnedStream first(setup_.spy);
  const OwnedStream second(setup_.spy);
  LateWriter writer;
  void* inside = take(2 * kFrame);
  void* block = take(kLimit, first.get());
  writer.write(block, kLimit, first.get(), std::chrono::milliseconds(20));
  drop(block);
  EXPECT_EQ(take(kLimit, first.get()), block);
  writer.write(block, kLimit, first.get(), std::chrono::milliseconds(20));
  drop(block);
  void* next = take(kLimit, second.get());
  writer.write(next, kLimit, second.get());
  setup_.spy->synchronize();
  EXPECT_EQ(writer.wrong(), 0U);
  drop(next);
  drop(inside);
}

TEST_F(OverflowTest, RecordedStreamsAreWaitedForBeforeMemoryGoes) {
  const OwnedStream stream(setup_.spy);
  LateWriter writer;
  void* inside = take(2 * kFrame);
  void* block = take(kLimit);
  setup_.allocator->record_stream(block, stream.get());
  writer.write(block, kLimit, stream.get(), std::chrono::milliseconds(20));
  drop(block);
  EXPECT_EQ(overflow().stats().live, 0U);
  EXPECT_EQ(overflow().stats().held, kLimit);
  setup_.allocator->empty_cache();  // unmapped too soon, the writer would fault
  EXPECT_EQ(overflow().stats().held, 0U);
  EXPECT_EQ(writer.wrong(), 0U);
  drop(inside);
}

TEST_F(OverflowTest, OtherSizesGetTheMemoryOfFreedBlocks) {
  void* inside = take(2 * kFrame);
  drop(take(5 * kMiB));
  drop(take(3 * kMiB));
  void* most = take(kLimit);
  EXPECT_EQ(overflow().stats().held, kLimit);
  drop(most);
  drop(inside);
}

TEST_F(OverflowTest, WhatAGraphUsesStaysInFrames) {
  setup_.allocator->begin_pool(kPool, [](StreamHandle) { return true; });
  void* inside = take(2 * kFrame);
  EXPECT_THROW(take(kMiB), CapExceededError);
  setup_.allocator->end_pool(kPool);
  setup_.allocator->release_pool(kPool);
  drop(inside);
}

TEST_F(OverflowTest, MemoryIsNotGivenBackWhileTheStreamItWaitsForCaptures) {
  const OwnedStream stream(setup_.spy);
  void* inside = take(2 * kFrame);
  void* block = take(2 * kMiB);
  setup_.allocator->record_stream(block, stream.get());
  setup_.spy->set_capturing(stream.get(), true);
  drop(block);
  overflow().empty_cache();
  EXPECT_EQ(overflow().stats().held, 2 * kMiB);
  setup_.spy->set_capturing(stream.get(), false);
  EXPECT_NE(take(kLimit), nullptr);
  EXPECT_EQ(overflow().stats().held, kLimit);
  drop(inside);
}

TEST_F(OverflowTest, EachDeviceCallThatFailsRefusesAtMostAndLosesNothing) {
  for (std::uint64_t position = 0;; ++position) {
    AllocatorSetup setup(2);
    setup.allocator->overflow().set_limit(kLimit);
    const OwnedStream stream(setup.spy);
    LateWriter writer;
    std::vector<void*> live;
    const auto attempt = [&](std::size_t nbytes) {
      try {
        live.push_back(setup.take(nbytes));
      } catch (const CapExceededError&) {
      } catch (const DeviceError&) {
      }
    };
    attempt(2 * kFrame);
    setup.device->fail_nth_call(position);
    attempt(3 * kMiB);
    attempt(5 * kMiB);
    if (live.size() > 1) {
      setup.allocator->record_stream(live.back(), stream.get());
      writer.write(live.back(), kMiB, stream.get(), std::chrono::milliseconds(1));
      setup.allocator->free(live.back());
      live.pop_back();
    }
    attempt(4 * kMiB);
    for (void* block : live) setup.allocator->free(block);
    const bool fired = setup.device->fired();
    setup.device->reset();
    setup.spy->synchronize();
    setup.allocator->empty_cache();
    setup.allocator->empty_cache();  // what could not be recorded the first time
    EXPECT_EQ(setup.allocator->overflow().stats().held, 0U) << position;
    EXPECT_EQ(setup.allocator->overflow().stats().live, 0U) << position;
    EXPECT_TRUE(setup.balanced()) << position;
    EXPECT_EQ(writer.wrong(), 0U) << position;
    if (!fired) break;
  }
}

}  // namespace
}  // namespace penstock
