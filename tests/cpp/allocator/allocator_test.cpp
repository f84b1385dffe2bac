// What the allocator gives out, keeps and gives back, on one stream at a time.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "support/allocator_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

std::byte* bytes(void* address) {
  return static_cast<std::byte*>(address);
}

TEST(Allocator, NoBytesAreNull) {
  AllocatorSetup setup(1);
  EXPECT_EQ(setup.take(0), nullptr);
  setup.allocator->free(nullptr);
  setup.allocator->record_stream(nullptr, kHere);
  EXPECT_EQ(setup.used_frames(), 0U);
}

TEST(Allocator, BlocksAreAlignedReadableAndApart) {
  AllocatorSetup setup(8);
  LateWriter writer;
  std::vector<std::pair<std::byte*, std::size_t>> blocks;
  for (const std::size_t nbytes : {std::size_t{1}, std::size_t{511}, std::size_t{512},
                                   std::size_t{513}, kMiB, kMiB + 1, 3 * kMiB, 5 * kMiB}) {
    blocks.emplace_back(bytes(setup.take(nbytes)), nbytes);
  }
  for (const auto& [start, nbytes] : blocks) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(start) % kBlockAlignment, 0U);
    writer.write(start, nbytes, kHere);
    for (const auto& [other, size] : blocks) {
      EXPECT_TRUE(other == start || other + size <= start || start + nbytes <= other);
    }
  }
  EXPECT_EQ(writer.wrong(), 0U);
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, FreedBlockIsUsedAgainAndNoFrameIsMade) {
  AllocatorSetup setup(4);
  void* first = setup.take(3 * kMiB);
  setup.allocator->free(first);
  EXPECT_EQ(setup.take(3 * kMiB), first);
  setup.allocator->free(first);
  EXPECT_EQ(setup.take(2 * kMiB), first);  // cut off it
  EXPECT_EQ(setup.device->calls()["frame_create"], 2U);
}

TEST(Allocator, SmallBlocksDoNotPinFramesUnderLargeOnes) {
  AllocatorSetup setup(8);
  std::vector<void*> large;
  for (int i = 0; i < 3; ++i) {
    large.push_back(setup.take(kFrame));
    setup.take(1000);
  }
  for (void* block : large) setup.allocator->free(block);
  EXPECT_EQ(setup.allocator->empty_cache(), 3 * kFrame);
  EXPECT_EQ(setup.used_frames(), 1U);
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, NeighboursJoinWhenALargerBlockIsWanted) {
  AllocatorSetup setup(4);
  std::vector<void*> parts;
  for (int i = 0; i < 4; ++i) parts.push_back(setup.take(2 * kMiB));
  for (void* part : {parts[1], parts[3], parts[0], parts[2]}) setup.allocator->free(part);
  EXPECT_EQ(setup.take(8 * kMiB), parts[0]);
  EXPECT_EQ(setup.used_frames(), 4U);
}

TEST(Allocator, BestFitIsTheSmallestAndThenTheLowest) {
  AllocatorSetup setup(16);
  std::vector<void*> blocks;
  for (const std::size_t mib : {4, 2, 3, 2, 3, 2}) {
    blocks.push_back(setup.take(mib * kMiB));
  }
  for (const std::size_t i : {0U, 4U, 2U}) setup.allocator->free(blocks[i]);
  EXPECT_EQ(setup.take(5 * kMiB / 2), blocks[2]);
}

TEST(Allocator, LargeBlockTakesTheFewestNewFrames) {
  AllocatorSetup setup(6);
  void* first = setup.take(2 * kFrame);
  void* second = setup.take(kFrame);
  setup.allocator->free(first);
  EXPECT_EQ(setup.allocator->give_back(kFrame), kFrame);  // the upper half of the first
  // Two frames fit into the gap, which takes one more; anywhere else takes two.
  EXPECT_EQ(setup.take(2 * kFrame), first);
  EXPECT_EQ(setup.used_frames(), 3U);
  setup.allocator->free(second);
  EXPECT_EQ(setup.take(3 * kFrame), second);  // with two frames behind it
  EXPECT_EQ(setup.used_frames(), 5U);
}

TEST(Allocator, FragmentedFramesBecomeOneBlock) {
  AllocatorSetup setup(6);
  std::vector<void*> blocks;
  for (int i = 0; i < 6; ++i) blocks.push_back(setup.take(kFrame));
  for (const std::size_t i : {0U, 2U, 4U}) setup.allocator->free(blocks[i]);
  EXPECT_EQ(setup.budget->available(), 0U);
  LateWriter writer;
  void* large = setup.take(3 * kFrame);  // no three of the free ones lie together
  writer.write(large, 3 * kFrame, kHere);
  EXPECT_EQ(writer.wrong(), 0U);
  EXPECT_EQ(setup.spy->most_frames(), 6);
  EXPECT_EQ(setup.device->calls()["frame_create"], 6U);  // the same frames at other addresses
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, RefusalHasTheNumbersAndChangesNothing) {
  AllocatorSetup setup(4);
  void* large = setup.take(5 * kMiB);
  setup.take(100);
  try {
    setup.take(kFrame);
    FAIL() << "there is no room";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.requested, kFrame);
    EXPECT_EQ(error.cap, 4 * kFrame);
    EXPECT_EQ(error.used, 4 * kFrame);
    const std::string text = error.what();
    for (const char* part : {"2.00 MiB", "8.00 MiB", "activations", "5.00 MiB", "512 bytes"}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
    }
  }
  const AllocatorStats stats = setup.allocator->stats();
  EXPECT_EQ(stats.num_ooms, 1U);
  EXPECT_EQ(stats.num_alloc_retries, 1U);
  setup.allocator->free(large);
  EXPECT_NE(setup.take(kFrame), nullptr);
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, RefusalDoesNotCountWhatTheRequestHadGathered) {
  AllocatorSetup setup(4);
  setup.take(3 * kFrame);
  try {
    setup.take(2 * kFrame);
    FAIL() << "there is no room";
  } catch (const CapExceededError& error) {
    EXPECT_EQ(error.used, 3 * kFrame);
  }
  EXPECT_EQ(setup.used_frames(), 3U);
}

TEST(Allocator, WhatNeverFitsDisturbsNobody) {
  AllocatorSetup setup(4);
  setup.allocator->free(setup.take(kFrame));
  for (const std::size_t nbytes : {5 * kFrame, std::numeric_limits<std::size_t>::max()}) {
    EXPECT_THROW(setup.take(nbytes), CapExceededError);
  }
  EXPECT_EQ(setup.used_frames(), 1U);
}

TEST(Allocator, UnknownAddressesAreErrorsAndHarmless) {
  AllocatorSetup setup(2);
  auto* block = bytes(setup.take(2000));
  int other = 0;
  for (void* wrong : {static_cast<void*>(&other), static_cast<void*>(block + 512),
                      static_cast<void*>(block + 1)}) {
    EXPECT_THROW(setup.allocator->free(wrong), std::invalid_argument);
    EXPECT_THROW(setup.allocator->record_stream(wrong, kHere), std::invalid_argument);
    EXPECT_FALSE(setup.allocator->find_block(wrong));
  }
  setup.allocator->free(block);
  EXPECT_THROW(setup.allocator->free(block), std::invalid_argument);  // twice
  EXPECT_EQ(setup.take(2000), block);
  EXPECT_NE(setup.take(2000), block);
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, RoomIsMadeByOthersAfterItsOwnCachesAreEmpty) {
  struct Weights : RoomSource {
    explicit Weights(FramePool& pool) {
      for (int i = 0; i < 2; ++i) frames.push_back(std::move(*pool.try_take(Tag::kWeights)));
    }
    std::size_t give_back(std::size_t nbytes) override {
      asked.push_back(nbytes);
      const std::size_t count = std::min(nbytes / kFrame, frames.size());
      frames.resize(frames.size() - count);
      return count * kFrame;
    }
    std::vector<Frame> frames;
    std::vector<std::size_t> asked;
  };
  AllocatorSetup setup(5);
  const OwnedStream stream(setup.spy);
  const auto weights = std::make_shared<Weights>(*setup.pool);
  setup.pool->add_source(weights, RoomRank::kResidentSet);
  setup.allocator->free(setup.take(2 * kFrame, stream.get()));
  setup.take(3 * kFrame);  // one is free, two are cached
  EXPECT_TRUE(weights->asked.empty());
  setup.take(kFrame);
  EXPECT_EQ(weights->asked, std::vector<std::size_t>{kFrame});
  EXPECT_THROW(setup.take(2 * kFrame), CapExceededError);
  EXPECT_TRUE(setup.balanced() || !weights->frames.empty());
}

TEST(Allocator, IsAskedForRoomByOthers) {
  AllocatorSetup setup(4);
  setup.allocator->free(setup.take(3 * kFrame));
  setup.take(10);
  EXPECT_FALSE(setup.pool->try_take(Tag::kWeights));
  EXPECT_TRUE(setup.pool->make_room(2 * kFrame, nullptr));
  EXPECT_TRUE(setup.pool->try_take(Tag::kWeights));
  EXPECT_FALSE(setup.pool->make_room(4 * kFrame, nullptr));  // a small block lives
  EXPECT_EQ(setup.used_frames(), 1U);
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, AddressesThatRunOutAreReservedAnew) {
  AllocatorSetup setup(8, {kFrame, 2 * kFrame});
  std::vector<void*> blocks;
  for (int i = 0; i < 5; ++i) blocks.push_back(setup.take(kFrame));
  for (int i = 0; i < 3; ++i) blocks.push_back(setup.take(kMiB));
  EXPECT_EQ(setup.used_frames(), 7U);
  EXPECT_THROW(setup.take(3 * kFrame), CapExceededError);
  for (void* block : blocks) setup.allocator->free(block);
  EXPECT_NE(setup.take(8 * kFrame), nullptr);  // larger than an arena is
  EXPECT_TRUE(setup.balanced());
}

TEST(Allocator, FiguresAreThoseOfTorch) {
  AllocatorSetup setup(8);
  CachingAllocator& allocator = *setup.allocator;
  void* small = setup.take(1000);
  void* large = setup.take(3 * kMiB - 100);
  AllocatorStats stats = allocator.stats();
  EXPECT_EQ(stats.side(Side::kSmall).allocated_bytes.current, 1024);
  EXPECT_EQ(stats.side(Side::kSmall).requested_bytes.current, 1000);
  EXPECT_EQ(stats.side(Side::kLarge).allocated_bytes.current, 3 << 20);
  EXPECT_EQ(stats.side(Side::kAll).allocation.current, 2);
  EXPECT_EQ(stats.side(Side::kAll).segment.current, 3);
  EXPECT_EQ(stats.side(Side::kAll).inactive_split.current, 2);
  EXPECT_EQ(stats.side(Side::kAll).inactive_split_bytes.current, (6 << 20) - 1024 - (3 << 20));
  allocator.free(small);
  allocator.free(large);
  stats = allocator.stats();
  EXPECT_EQ(stats.side(Side::kAll).allocated_bytes.current, 0);
  EXPECT_EQ(stats.side(Side::kAll).allocated_bytes.peak, 1024 + (3 << 20));
  EXPECT_EQ(stats.side(Side::kAll).allocated_bytes.freed, 1024 + (3 << 20));
  EXPECT_EQ(stats.side(Side::kAll).active_bytes.current, 0);
  EXPECT_EQ(stats.side(Side::kAll).requested_bytes.current, 0);
  EXPECT_EQ(stats.side(Side::kAll).inactive_split_bytes.current, 0);  // all of it is cached
  EXPECT_EQ(stats.num_device_alloc, 3U);
  allocator.reset_peak_stats();
  allocator.reset_accumulated_stats();
  stats = allocator.stats();
  EXPECT_EQ(stats.side(Side::kAll).allocated_bytes.peak, 0);
  EXPECT_EQ(stats.side(Side::kAll).reserved_bytes.peak, 3 * (2 << 20));
  EXPECT_EQ(stats.side(Side::kAll).allocation.allocated, 0);
}

TEST(Allocator, LiveBlocksAreListedByAge) {
  AllocatorSetup setup(8);
  const OwnedStream stream(setup.spy);
  void* first = setup.take(10);
  void* second = setup.take(2 * kMiB, stream.get());
  setup.allocator->free(setup.take(10));
  const auto live = setup.allocator->live_blocks();
  ASSERT_EQ(live.size(), 2U);
  EXPECT_EQ(live[0].address, first);
  EXPECT_EQ(live[0].nbytes, 512U);
  EXPECT_EQ(live[0].requested, 10U);
  EXPECT_EQ(live[1].address, second);
  EXPECT_EQ(live[1].stream.value, stream.get().value);
  EXPECT_LT(live[0].sequence, live[1].sequence);
}

TEST(Allocator, ArenasThatDoNotFitFramesAreRefused) {
  AllocatorSetup setup(1);
  EXPECT_THROW(CachingAllocator::create(setup.pool, {kFrame + 512, kFrame}), std::invalid_argument);
}

TEST(Allocator, CapCanChangeWhileItWorks) {
  AllocatorSetup setup(4);
  void* block = setup.take(3 * kFrame);
  EXPECT_FALSE(setup.budget->try_set_cap(2 * kFrame));
  setup.allocator->free(block);
  EXPECT_FALSE(setup.budget->try_set_cap(2 * kFrame));  // cached frames count
  setup.allocator->empty_cache();
  EXPECT_TRUE(setup.budget->try_set_cap(2 * kFrame));
  EXPECT_THROW(setup.take(3 * kFrame), CapExceededError);
  EXPECT_TRUE(setup.budget->try_set_cap(3 * kFrame));
  EXPECT_NE(setup.take(3 * kFrame), nullptr);
}

TEST(Allocator, NothingIsLeftWhenItGoes) {
  AllocatorSetup setup(8);
  const OwnedStream stream(setup.spy);
  LateWriter writer;
  void* block = setup.take(3 * kMiB, stream.get());
  writer.write(block, 3 * kMiB, stream.get(), std::chrono::milliseconds(20));
  setup.allocator->free(block);
  setup.take(100);
  setup.allocator.reset();
  EXPECT_EQ(writer.wrong(), 0U);
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_EQ(setup.spy->frames(), 0);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
}

}  // namespace
}  // namespace penstock
