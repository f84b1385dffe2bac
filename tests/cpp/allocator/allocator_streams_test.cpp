// Memory that several streams use, and private pools. Streams of the host device run late, so a
// block that goes on too early is seen to be overwritten.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr PoolId kPool{1, 0};

CachingAllocator::StreamFilter only(StreamHandle stream) {
  return [value = stream.value](StreamHandle other) { return other.value == value; };
}

struct StreamsSetup : AllocatorSetup {
  using AllocatorSetup::AllocatorSetup;
  void settle() const { spy->synchronize(); }
  OwnedStream first{spy};
  OwnedStream second{spy};
  LateWriter writer;
};

// ---- stream order ------------------------------------------------------------------------------

TEST(AllocatorStreams, FreedBlockIsUsedAtOnceByItsStreamInOrder) {
  StreamsSetup setup(2);
  for (int i = 0; i < 20; ++i) {
    void* block = setup.take(kMiB, setup.first.get());
    setup.writer.write(block, kMiB, setup.first.get(), milliseconds(1));
    setup.allocator->free(block);
  }
  EXPECT_EQ(setup.used_frames(), 1U);
  setup.settle();
  EXPECT_EQ(setup.writer.wrong(), 0U);
}

TEST(AllocatorStreams, StreamsDoNotShareBlocks) {
  StreamsSetup setup(4);
  void* block = setup.take(kMiB, setup.first.get());
  setup.allocator->free(block);
  EXPECT_NE(setup.take(kMiB, setup.second.get()), block);
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), block);
}

TEST(AllocatorStreams, RecordedBlockWaitsForTheWorkOfTheOtherStream) {
  Gate busy;
  StreamsSetup setup(2);
  void* block = setup.take(kMiB, setup.first.get());
  setup.allocator->record_stream(block, setup.second.get());
  setup.allocator->record_stream(block, setup.second.get());
  run_on(setup.second.get(), [&] { busy.wait(); });
  setup.writer.write(block, kMiB, setup.second.get(), milliseconds(5));
  setup.allocator->free(block);
  EXPECT_THROW(setup.allocator->free(block), std::invalid_argument);
  void* other = setup.take(kMiB, setup.first.get());
  EXPECT_NE(other, block);
  setup.writer.write(other, kMiB, setup.first.get());
  const AllocatorStats stats = setup.allocator->stats();
  EXPECT_EQ(stats.side(Side::kAll).allocation.current, 1);
  EXPECT_EQ(stats.side(Side::kAll).active.current, 2);
  busy.open();
  setup.settle();
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), block);
  EXPECT_EQ(setup.writer.wrong(), 0U);
}

TEST(AllocatorStreams, WorkGivenAfterTheFreeIsNotWaitedFor) {
  Gate busy;
  StreamsSetup setup(2);
  void* block = setup.take(kMiB, setup.first.get());
  setup.allocator->record_stream(block, setup.second.get());
  setup.allocator->free(block);
  setup.spy->stream_synchronize(setup.second.get());
  run_on(setup.second.get(), [&] { busy.wait(); });
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), block);
  busy.open();
}

TEST(AllocatorStreams, OwnStreamNeedsNoRecord) {
  StreamsSetup setup(2);
  void* block = setup.take(kMiB, setup.first.get());
  setup.allocator->record_stream(block, setup.first.get());
  setup.allocator->free(block);
  EXPECT_EQ(setup.device->calls()["event_record"], 0U);
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), block);
}

TEST(AllocatorStreams, HeldBlocksAreWaitedForBeforeARefusal) {
  StreamsSetup setup(1);
  void* block = setup.take(kFrame, setup.first.get());
  setup.allocator->record_stream(block, setup.second.get());
  setup.writer.write(block, kFrame, setup.second.get(), milliseconds(20));
  setup.allocator->free(block);
  void* again = setup.take(kFrame, setup.first.get());
  setup.writer.write(again, kFrame, setup.first.get());
  setup.settle();
  EXPECT_EQ(setup.writer.wrong(), 0U);
}

TEST(AllocatorStreams, FramesMoveToAnotherStreamAfterTheWorkOnThem) {
  StreamsSetup setup(2);
  void* block = setup.take(2 * kFrame, setup.first.get());
  setup.writer.write(block, 2 * kFrame, setup.first.get(), milliseconds(20));
  setup.allocator->free(block);
  void* other = setup.take(2 * kFrame, setup.second.get());
  setup.writer.write(other, 2 * kFrame, setup.second.get());
  setup.settle();
  EXPECT_EQ(setup.writer.wrong(), 0U);
  EXPECT_EQ(setup.device->calls()["frame_create"], 2U);
  EXPECT_TRUE(setup.balanced());
}

TEST(AllocatorStreams, GivingBackWaitsForTheStreamAndHoldsNobodyUp) {
  Gate busy;
  StreamsSetup setup(3);
  void* block = setup.take(2 * kFrame, setup.first.get());
  run_on(setup.first.get(), [&] { busy.wait(); });
  setup.writer.write(block, 2 * kFrame, setup.first.get());
  setup.allocator->free(block);
  Running giving([&] { EXPECT_EQ(setup.allocator->give_back(2 * kFrame), 2 * kFrame); });
  EXPECT_TRUE(eventually([&] { return setup.device->calls()["event_synchronize"] > 0; }));
  void* other = setup.take(kMiB, setup.second.get());  // meanwhile
  setup.allocator->free(other);
  EXPECT_FALSE(giving.ended());
  EXPECT_EQ(setup.used_frames(), 3U);
  busy.open();
  giving.join();
  EXPECT_EQ(setup.used_frames(), 1U);
  EXPECT_EQ(setup.writer.wrong(), 0U);
  EXPECT_TRUE(setup.balanced());
}

TEST(AllocatorStreams, TheLongestUnusedFramesGoFirst) {
  StreamsSetup setup(4);
  void* older = setup.take(kFrame, setup.first.get());
  void* newer = setup.take(kFrame, setup.second.get());
  setup.allocator->free(older);
  setup.allocator->free(newer);
  EXPECT_EQ(setup.allocator->give_back(kFrame), kFrame);
  EXPECT_EQ(setup.take(kFrame, setup.second.get()), newer);
  EXPECT_EQ(setup.device->calls()["frame_create"], 2U);
}

TEST(AllocatorStreams, FramesThatTheRequestWillUseStayWhereTheyAre) {
  StreamsSetup setup(4);
  void* older = setup.take(2 * kFrame, setup.first.get());
  void* newer = setup.take(kFrame, setup.second.get());
  setup.take(kFrame, setup.second.get());
  setup.allocator->free(older);
  setup.allocator->free(newer);
  EXPECT_EQ(setup.take(3 * kFrame, setup.first.get()), older);  // and one more frame behind it
  EXPECT_EQ(setup.device->calls()["unmap"], 1U);
}

TEST(AllocatorStreams, WorkThatFailedHoldsNothing) {
  StreamsSetup setup(1);
  void* block = setup.take(kFrame, setup.first.get());
  setup.allocator->record_stream(block, setup.second.get());
  run_on(setup.second.get(), [] { throw DeviceError("kernel", 1, "failed"); });
  setup.allocator->free(block);
  EXPECT_NE(setup.take(kFrame, setup.first.get()), nullptr);
  EXPECT_TRUE(setup.balanced());
}

// ---- private pools -----------------------------------------------------------------------------

TEST(AllocatorPools, PoolServesTheStreamsOfItsFilterWhileItIsBegun) {
  StreamsSetup setup(8);
  CachingAllocator& allocator = *setup.allocator;
  void* before = setup.take(kMiB, setup.first.get());
  allocator.free(before);
  allocator.begin_pool(kPool, only(setup.first.get()));
  void* inside = setup.take(kMiB, setup.first.get());
  void* beside = setup.take(kMiB, setup.second.get());
  EXPECT_NE(inside, before);
  EXPECT_EQ(allocator.find_block(inside)->pool, kPool);
  EXPECT_EQ(allocator.find_block(beside)->pool, PoolId{});
  allocator.free(inside);
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), inside);
  allocator.end_pool(kPool);
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), before);
  allocator.free(inside);
  EXPECT_NE(setup.take(kMiB, setup.first.get()), inside);
  allocator.begin_pool(kPool, only(setup.first.get()));  // another graph in the same pool
  EXPECT_EQ(setup.take(kMiB, setup.first.get()), inside);
}

TEST(AllocatorPools, FramesOfAPoolStayUntilItIsReleasedAndEmpty) {
  StreamsSetup setup(4);
  CachingAllocator& allocator = *setup.allocator;
  allocator.begin_pool(kPool, only(setup.first.get()));
  void* kept = setup.take(kFrame, setup.first.get());
  allocator.free(setup.take(2 * kFrame, setup.first.get()));
  allocator.end_pool(kPool);
  allocator.begin_pool(kPool, only(setup.first.get()));
  allocator.end_pool(kPool);
  EXPECT_EQ(allocator.empty_cache(), 0U);
  allocator.release_pool(kPool);
  EXPECT_EQ(allocator.empty_cache(), 0U);  // one more graph has it
  EXPECT_THROW(setup.take(2 * kFrame), CapExceededError);
  allocator.release_pool(kPool);
  EXPECT_EQ(allocator.empty_cache(), 0U);  // one block lives
  allocator.free(kept);
  EXPECT_EQ(allocator.empty_cache(), 3 * kFrame);
  EXPECT_EQ(setup.used_frames(), 0U);
  EXPECT_TRUE(setup.balanced());
}

TEST(AllocatorPools, ReleasedPoolIsWaitedForOnAllStreams) {
  StreamsSetup setup(1);
  CachingAllocator& allocator = *setup.allocator;
  allocator.begin_pool(kPool, only(setup.first.get()));
  void* block = setup.take(kFrame, setup.first.get());
  allocator.end_pool(kPool);
  setup.writer.write(block, kFrame, setup.second.get(), milliseconds(20));  // a replay
  allocator.free(block);
  allocator.release_pool(kPool);
  void* other = setup.take(kFrame);
  setup.writer.write(other, kFrame, kHere);
  setup.settle();
  EXPECT_EQ(setup.writer.wrong(), 0U);
  EXPECT_THROW(allocator.release_pool(kPool), std::invalid_argument);  // forgotten
}

TEST(AllocatorPools, CaptureBeginsAfterAWaitForTheWholeDevice) {
  Gate busy;
  StreamsSetup setup(2);
  CachingAllocator& allocator = *setup.allocator;
  allocator.begin_pool(kPool, only(setup.first.get()));
  allocator.free(setup.take(kFrame, setup.first.get()));
  allocator.end_pool(kPool);
  allocator.release_pool(kPool);
  run_on(setup.second.get(), [&] { busy.wait(); });
  std::atomic<bool> emptied{false};
  std::atomic<bool> opened{false};
  std::thread other([&] {
    EXPECT_EQ(allocator.empty_cache(), kFrame);
    emptied = true;
  });
  while (setup.device->calls()["synchronize"] == 0) std::this_thread::yield();
  std::thread work([&] {
    std::this_thread::sleep_for(milliseconds(20));
    EXPECT_FALSE(emptied);
    opened = true;
    busy.open();
  });
  allocator.begin_pool(kPool, only(setup.first.get()));
  setup.spy->set_capturing(setup.first.get(), true);
  EXPECT_TRUE(opened);
  setup.spy->set_capturing(setup.first.get(), false);
  allocator.end_pool(kPool);
  work.join();
  other.join();
  allocator.release_pool(kPool);
}

TEST(AllocatorPools, NothingIsRecordedOnAStreamThatCaptures) {
  StreamsSetup setup(2);
  CachingAllocator& allocator = *setup.allocator;
  void* outside = setup.take(kMiB, setup.first.get());
  void* cached = setup.take(kFrame, setup.first.get());
  allocator.begin_pool(kPool, only(setup.first.get()));
  setup.spy->set_capturing(setup.first.get(), true);
  setup.spy->set_capturing(setup.second.get(), true);
  allocator.record_stream(outside, setup.second.get());
  allocator.free(outside);
  allocator.free(cached);  // its frame belongs to a stream that captures: it stays
  EXPECT_THROW(setup.take(kFrame), CapExceededError);
  EXPECT_EQ(setup.device->calls()["event_record"], 0U);
  EXPECT_EQ(allocator.stats().side(Side::kAll).active.current, 1);
  setup.spy->set_capturing(setup.first.get(), false);
  setup.spy->set_capturing(setup.second.get(), false);
  allocator.end_pool(kPool);
  void* block = setup.take(kFrame);
  EXPECT_EQ(setup.device->calls()["event_record"], 2U);
  allocator.free(block);
  allocator.release_pool(kPool);
  setup.settle();
  EXPECT_EQ(allocator.empty_cache(), 2 * kFrame);
}

TEST(AllocatorPools, BlockThatWasRecordedInACaptureIsHeldUntilItsEnd) {
  Gate busy;
  StreamsSetup setup(4);
  CachingAllocator& allocator = *setup.allocator;
  allocator.begin_pool(kPool, only(setup.first.get()));
  setup.spy->set_capturing(setup.first.get(), true);
  setup.spy->set_capturing(setup.second.get(), true);
  void* block = setup.take(kMiB, setup.first.get());
  allocator.record_stream(block, setup.second.get());
  allocator.free(block);
  EXPECT_NE(setup.take(kMiB, setup.first.get()), block);
  EXPECT_EQ(setup.device->calls()["event_record"], 0U);
  setup.spy->set_capturing(setup.first.get(), false);
  setup.spy->set_capturing(setup.second.get(), false);
  // Requests that miss look at what is held: the first one can record, the second one is told.
  run_on(setup.second.get(), [&] { busy.wait(); });
  allocator.free(setup.take(2 * kMiB, setup.first.get()));
  EXPECT_EQ(allocator.stats().side(Side::kAll).active.current, 2);
  busy.open();
  setup.settle();
  allocator.free(setup.take(3 * kMiB, setup.first.get()));
  EXPECT_EQ(allocator.stats().side(Side::kAll).active.current, 1);
}

TEST(AllocatorPools, WrongOrdersAreErrors) {
  StreamsSetup setup(2);
  CachingAllocator& allocator = *setup.allocator;
  EXPECT_THROW(allocator.end_pool(kPool), std::invalid_argument);
  EXPECT_THROW(allocator.release_pool(kPool), std::invalid_argument);
  allocator.begin_pool(kPool, only(setup.first.get()));
  EXPECT_THROW(allocator.begin_pool(kPool, only(setup.first.get())), std::invalid_argument);
  allocator.release_pool(kPool);  // torch may release before it ends
  void* block = setup.take(kMiB, setup.first.get());
  EXPECT_EQ(allocator.find_block(block)->pool, kPool);
  allocator.end_pool(kPool);
  EXPECT_THROW(allocator.release_pool(kPool), std::invalid_argument);
  allocator.free(block);
  EXPECT_EQ(allocator.empty_cache(), kFrame);
}

}  // namespace
}  // namespace penstock
