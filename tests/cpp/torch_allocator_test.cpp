// The functions that torch calls, called as torch does.
#include "torch_allocator/torch_allocator.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr int kDevice = 3;

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void throw_out_of_memory(const char* message) {
  throw OutOfMemory(message);
}

class TorchAllocator : public ::testing::Test {
 protected:
  void SetUp() override { torch_allocator::install(kDevice, setup_.allocator); }
  void TearDown() override {
    torch_allocator::set_thrower(nullptr);
    if (torch_allocator::installed(kDevice)) torch_allocator::uninstall(kDevice);
  }
  void* take(std::size_t nbytes, StreamHandle stream = kHere) {
    return penstock_malloc(nbytes, kDevice, stream.value);
  }
  void drop(void* address) { penstock_free(address, 0, kDevice, nullptr); }

  AllocatorSetup setup_{4};
};

TEST_F(TorchAllocator, MemoryComesFromTheAllocatorOfTheDevice) {
  void* block = take(1000);
  EXPECT_EQ(setup_.allocator->live_blocks().size(), 1U);
  std::size_t size = 0;
  EXPECT_EQ(penstock_base_alloc(block, &size), block);
  EXPECT_EQ(size, 1024U);
  drop(block);
  EXPECT_TRUE(setup_.allocator->live_blocks().empty());
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 0U);
  EXPECT_EQ(take(0), nullptr);
  drop(nullptr);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
}

TEST_F(TorchAllocator, TheLargestBlockIsOneThatCanBeHad) {
  const std::size_t all = penstock_largest_block(kDevice);
  void* block = take(kFrame);
  EXPECT_EQ(penstock_largest_block(kDevice), all - kFrame);
  drop(block);  // cached, and free to be part of another
  EXPECT_EQ(penstock_largest_block(kDevice), all);
  block = take(all);
  EXPECT_NE(block, nullptr);
  EXPECT_EQ(penstock_largest_block(kDevice), 0U);
  drop(block);
  EXPECT_EQ(penstock_largest_block(kDevice + 1), 0U);
}

TEST_F(TorchAllocator, WhatTheThrowerThrowsReachesTheCaller) {
  EXPECT_THROW(take(5 * kFrame), std::runtime_error);
  torch_allocator::set_thrower(throw_out_of_memory);
  try {
    take(5 * kFrame);
    FAIL() << "there is no room";
  } catch (const OutOfMemory& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.rfind("CUDA out of memory. Tried to allocate 10.00 MiB", 0), 0U) << text;
    EXPECT_NE(text.find("the cap is 8.00 MiB"), std::string::npos) << text;
  }
  torch_allocator::set_thrower([](const char*) {});  // one that does not throw
  EXPECT_THROW(take(5 * kFrame), std::runtime_error);
}

TEST_F(TorchAllocator, TheDeviceThatIsFullIsMemoryThatRanOutToo) {
  struct FullDevice : HostDevice {
    FrameHandle frame_create(std::size_t) override {
      throw DeviceError("cuMemCreate", 2, "out of memory");
    }
  };
  const auto budget = std::make_shared<Budget>(4 * kFrame);
  const auto pool = FramePool::create(std::make_shared<FullDevice>(), budget, kFrame);
  torch_allocator::install(kDevice + 1, CachingAllocator::create(pool));
  torch_allocator::set_thrower(throw_out_of_memory);
  try {
    penstock_malloc(100, kDevice + 1, nullptr);
    FAIL() << "the device is full";
  } catch (const OutOfMemory& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.rfind("CUDA out of memory. Tried to allocate 100 bytes", 0), 0U) << text;
    EXPECT_NE(text.find("cuMemCreate"), std::string::npos) << text;
  }
  EXPECT_EQ(budget->stats().used, 0U);
  torch_allocator::uninstall(kDevice + 1);
}

TEST_F(TorchAllocator, OtherErrorsAreNotTakenForMemoryThatRanOut) {
  torch_allocator::set_thrower(throw_out_of_memory);
  setup_.device->fail_nth_call_of("map", 0);
  try {
    take(100);
    FAIL() << "map fails";
  } catch (const OutOfMemory&) {
    FAIL() << "memory did not run out";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("map"), std::string::npos);
  }
  try {
    penstock_malloc(100, kDevice + 1, nullptr);
    FAIL() << "no allocator";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("device 4"), std::string::npos);
  }
}

TEST_F(TorchAllocator, ForAPoolMemoryThatRanOutIsNull) {
  void* block = penstock_pool_malloc(kFrame, kDevice, nullptr);
  EXPECT_NE(block, nullptr);
  EXPECT_EQ(penstock_pool_malloc(4 * kFrame, kDevice, nullptr), nullptr);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
  EXPECT_EQ(penstock_pool_malloc(100, kDevice + 1, nullptr), nullptr);
  setup_.device->fail_nth_call_of("map", 0);
  EXPECT_EQ(penstock_pool_malloc(2 * kFrame, kDevice, nullptr), nullptr);
  EXPECT_EQ(setup_.device->suppressed_count(), 1U);
  penstock_pool_free(block, kFrame, kDevice, nullptr);
  EXPECT_EQ(setup_.used_frames(), 0U);
}

TEST_F(TorchAllocator, WhatCannotBeFreedIsOnRecord) {
  int other = 0;
  drop(&other);
  EXPECT_EQ(setup_.device->suppressed_count(), 1U);
  penstock_record_stream(&other, nullptr);
  EXPECT_EQ(setup_.device->suppressed_count(), 2U);
  penstock_free(&other, 0, kDevice + 1, nullptr);  // nobody to tell
  std::size_t size = 1;
  EXPECT_EQ(penstock_base_alloc(&other, &size), &other);
  EXPECT_EQ(size, 0U);
}

TEST_F(TorchAllocator, RecordedStreamsAreWaitedFor) {
  const OwnedStream stream(setup_.spy);
  LateWriter writer;
  void* block = take(4 * kFrame);
  penstock_record_stream(block, stream.get().value);
  writer.write(block, 4 * kFrame, stream.get(), std::chrono::milliseconds(20));
  drop(block);
  void* again = take(4 * kFrame);
  writer.write(again, 4 * kFrame, kHere);
  setup_.spy->synchronize();
  EXPECT_EQ(writer.wrong(), 0U);
  drop(again);
}

TEST_F(TorchAllocator, PoolsAreThoseOfTheFilter) {
  const OwnedStream stream(setup_.spy);
  const PenstockPoolId pool(0, 9);
  penstock_begin_pool(kDevice, pool, [&](void* other) { return other == stream.get().value; });
  EXPECT_THROW(penstock_begin_pool(kDevice, pool, [](void*) { return true; }),
               std::invalid_argument);
  void* inside = take(100, stream.get());
  void* outside = take(100);
  EXPECT_EQ(setup_.allocator->find_block(inside)->pool, (PoolId{0, 9}));
  EXPECT_EQ(setup_.allocator->find_block(outside)->pool, PoolId{});
  penstock_end_pool(kDevice, pool);
  drop(inside);
  drop(outside);
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 1U);
  penstock_release_pool(kDevice, pool);
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 0U);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
  penstock_end_pool(kDevice, pool);
  EXPECT_EQ(setup_.device->suppressed_count(), 1U);
}

TEST_F(TorchAllocator, InstallsOnceAndUninstallsWhenNothingIsInUse) {
  EXPECT_THROW(torch_allocator::install(kDevice, setup_.allocator), std::invalid_argument);
  EXPECT_THROW(torch_allocator::install(-1, setup_.allocator), std::invalid_argument);
  EXPECT_THROW(torch_allocator::install(64, setup_.allocator), std::invalid_argument);
  EXPECT_THROW(torch_allocator::install(0, nullptr), std::invalid_argument);
  EXPECT_THROW(torch_allocator::uninstall(kDevice + 1), std::invalid_argument);
  void* block = take(100);
  EXPECT_THROW(torch_allocator::uninstall(kDevice), std::invalid_argument);
  drop(block);
  EXPECT_EQ(torch_allocator::uninstall(kDevice), setup_.allocator);
  EXPECT_EQ(torch_allocator::installed(kDevice), nullptr);
  torch_allocator::install(kDevice, setup_.allocator);
}

TEST_F(TorchAllocator, AddressesOfSeveralDevicesFindTheirOwner) {
  AllocatorSetup other(2);
  const OwnedStream stream(setup_.spy);
  torch_allocator::install(kDevice + 1, other.allocator);
  void* block = penstock_malloc(700, kDevice + 1, nullptr);
  penstock_record_stream(block, stream.get().value);
  std::size_t size = 0;
  penstock_base_alloc(block, &size);
  EXPECT_EQ(size, 1024U);
  penstock_free(block, 0, kDevice + 1, nullptr);
  EXPECT_EQ(other.device->calls()["event_record"], 1U);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
  other.spy->synchronize();
  setup_.spy->synchronize();
  torch_allocator::uninstall(kDevice + 1);
}

}  // namespace
}  // namespace penstock
