// What the allocator promises, on every device: memory is only touched by Device::copy, so that
// this holds on a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "allocator/caching_allocator.hpp"
#include "device/handles.hpp"
#include "device/open/open_device.hpp"
#include "error/error.hpp"
#include "support/files.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr std::size_t kCapFrames = 8;
constexpr std::size_t kMiB = std::size_t{1} << 20;

class AllocatorContract : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string name = GetParam();
    if (name == "Cuda" && cuda_device_count() == 0) GTEST_SKIP() << no_cuda_reason();
    device_ = open_device(name == "Cuda" ? "cuda" : "cpu");
    frame_ = std::max(device_->info().frame_granularity, 2 * kMiB);
    budget_ = std::make_shared<Budget>(kCapFrames * frame_);
    pool_ = FramePool::create(device_, budget_, frame_);
    allocator_ = CachingAllocator::create(pool_);
    first_ = std::make_unique<OwnedStream>(device_);
    second_ = std::make_unique<OwnedStream>(device_);
    staging_ = static_cast<unsigned char*>(device_->pinned_allocate(kCapFrames * frame_));
    source_ = static_cast<unsigned char*>(device_->pinned_allocate(kCapFrames * frame_));
  }
  void TearDown() override {
    if (!device_) return;
    device_->synchronize();
    device_->pinned_free(staging_, kCapFrames * frame_);
    device_->pinned_free(source_, kCapFrames * frame_);
  }

  std::shared_ptr<Device> device_;
  std::size_t frame_ = 0;
  std::shared_ptr<Budget> budget_;
  std::shared_ptr<FramePool> pool_;
  std::shared_ptr<CachingAllocator> allocator_;
  std::unique_ptr<OwnedStream> first_;
  std::unique_ptr<OwnedStream> second_;
  unsigned char* staging_ = nullptr;
  unsigned char* source_ = nullptr;
};

TEST_P(AllocatorContract, BlocksHoldWhatIsWrittenToThem) {
  struct Written {
    void* address;
    Bytes bytes;
  };
  std::vector<Written> blocks;
  for (const std::size_t nbytes : {std::size_t{100}, kMiB, frame_ + 1, 3 * frame_}) {
    blocks.push_back({allocator_->allocate(nbytes, first_->get()), pattern(nbytes, nbytes)});
    std::memcpy(source_, blocks.back().bytes.data(), nbytes);
    device_->copy(blocks.back().address, source_, nbytes, first_->get());
    device_->stream_synchronize(first_->get());
  }
  for (const Written& block : blocks) {
    device_->copy(staging_, block.address, block.bytes.size(), first_->get());
    device_->stream_synchronize(first_->get());
    EXPECT_EQ(std::memcmp(staging_, block.bytes.data(), block.bytes.size()), 0);
    allocator_->free(block.address);
  }
  allocator_->empty_cache();
  EXPECT_EQ(budget_->stats().used, 0U);
}

// All memory goes from stream to stream, as one block and as many, with work under way throughout.
TEST_P(AllocatorContract, FramesMoveBetweenStreamsAndSizes) {
  const std::size_t whole = kCapFrames * frame_;
  std::memset(source_, 7, whole);
  for (int round = 0; round < 4; ++round) {
    const OwnedStream& stream = round % 2 == 0 ? *first_ : *second_;
    std::vector<void*> blocks;
    const std::size_t nbytes = round % 4 < 2 ? whole : frame_;
    for (std::size_t i = 0; i < whole / nbytes; ++i) {
      blocks.push_back(allocator_->allocate(nbytes, stream.get()));
      for (int again = 0; again < 3; ++again) {
        device_->copy(blocks.back(), source_, nbytes, stream.get());
      }
      device_->copy(staging_ + i * nbytes, blocks.back(), nbytes, stream.get());
    }
    EXPECT_THROW(allocator_->allocate(1, first_->get()), CapExceededError);
    for (void* block : blocks) allocator_->free(block);
    device_->stream_synchronize(stream.get());
    EXPECT_EQ(std::memcmp(staging_, source_, whole), 0);
    std::memset(staging_, 0, whole);
  }
  EXPECT_EQ(allocator_->stats().side(Side::kAll).segment.current,
            static_cast<std::int64_t>(kCapFrames));
}

TEST_P(AllocatorContract, RecordedBlockIsNotWrittenBeforeTheOtherStreamHasReadIt) {
  const std::size_t nbytes = 4 * frame_;
  std::memset(source_, 1, nbytes);
  std::memset(source_ + nbytes, 2, nbytes);
  for (int round = 0; round < 5; ++round) {
    void* block = allocator_->allocate(nbytes, first_->get());
    device_->copy(block, source_, nbytes, first_->get());
    const OwnedEvent written(device_);
    device_->event_record(written.get(), first_->get());
    device_->event_wait(second_->get(), written.get());
    for (int i = 0; i < 5; ++i) device_->copy(staging_, block, nbytes, second_->get());
    allocator_->record_stream(block, second_->get());
    allocator_->free(block);
    void* next = allocator_->allocate(nbytes, first_->get());
    device_->copy(next, source_ + nbytes, nbytes, first_->get());
    allocator_->free(next);
    device_->synchronize();
    EXPECT_EQ(std::memcmp(staging_, source_, nbytes), 0) << round;
  }
}

TEST_P(AllocatorContract, PhysicalMemoryFollowsTheLedger) {
  const std::size_t before = device_->memory_info().free_bytes;
  void* block = allocator_->allocate(kCapFrames * frame_, first_->get());
  device_->fill(block, 1, kCapFrames * frame_, first_->get());
  allocator_->free(block);
  EXPECT_EQ(allocator_->empty_cache(), kCapFrames * frame_);
  if (device_->info().kind == DeviceKind::kCuda) {
    EXPECT_GE(device_->memory_info().free_bytes + frame_, before);
  }
  EXPECT_EQ(budget_->stats().used, 0U);
}

INSTANTIATE_TEST_SUITE_P(On, AllocatorContract, ::testing::Values("Host", "Cuda"),
                         [](const auto& param) { return std::string(param.param); });

}  // namespace
}  // namespace penstock
