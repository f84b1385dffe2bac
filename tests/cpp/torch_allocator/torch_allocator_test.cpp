// The functions that torch calls, called as torch does.
#include "torch_allocator/torch_allocator.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

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

class TorchPool : public TorchAllocator {
 protected:
  static constexpr PenstockPoolId kPool{4, 0};

  void SetUp() override {
    TorchAllocator::SetUp();
    penstock_hold_pool(kDevice, kPool);
  }
  void begin() {
    penstock_begin_pool(kDevice, kPool, [](void*) { return true; });
  }
  void end() {
    penstock_end_pool(kDevice, kPool);
    penstock_release_pool(kDevice, kPool);
  }
  void* take_inside(std::size_t nbytes, StreamHandle stream = kHere) {
    begin();
    void* address = nullptr;
    try {
      address = take(nbytes, stream);
    } catch (...) {
      end();
      throw;
    }
    end();
    return address;
  }
  std::vector<PenstockBlock> blocks() const {
    std::vector<PenstockBlock> found;
    penstock_pool_blocks(kDevice, kPool, found);
    return found;
  }
  std::set<void*> addresses() const {
    std::set<void*> found;
    for (const PenstockBlock& block : blocks()) found.insert(block.address);
    return found;
  }
};

TEST_F(TorchPool, MemoryOfAHeldPoolStaysUntilItIsReleased) {
  EXPECT_EQ(penstock_pool_uses(kDevice, kPool), 1);
  begin();
  EXPECT_EQ(penstock_pool_uses(kDevice, kPool), 2);
  drop(take(kFrame));
  end();
  EXPECT_EQ(penstock_pool_uses(kDevice, kPool), 1);
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 1U);
  EXPECT_THROW(take(4 * kFrame), std::runtime_error) << "the pool keeps what it has";
  drop(take_inside(kFrame));
  EXPECT_EQ(setup_.used_frames(), 1U);
  penstock_release_pool(kDevice, kPool);
  EXPECT_EQ(penstock_pool_uses(kDevice, kPool), 0);
  drop(take(4 * kFrame));
  EXPECT_EQ(penstock_pool_uses(kDevice + 1, kPool), 0);
  EXPECT_THROW(penstock_hold_pool(kDevice + 1, kPool), std::runtime_error);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
  EXPECT_TRUE(setup_.balanced());
}

TEST_F(TorchPool, WhatIsLiveInAPoolIsTold) {
  void* outside = take(700);
  EXPECT_TRUE(blocks().empty());
  void* inside = take_inside(700);
  ASSERT_EQ(blocks().size(), 1U);
  EXPECT_EQ(blocks()[0].address, inside);
  EXPECT_EQ(blocks()[0].size, 700U);
  EXPECT_EQ(blocks()[0].block_size, 1024U);
  drop(inside);
  EXPECT_TRUE(blocks().empty());
  drop(outside);
}

// As a tree of graphs does: two graphs leave results in one pool, the second where the first had
// scratch memory; after a replay of the first one its results are live again.
TEST_F(TorchPool, ACheckpointPutsBlocksBackToWhereTheyWere) {
  const OwnedStream stream(setup_.spy);
  void* scratch = take_inside(kFrame);
  void* result = take_inside(3000);
  void* other = take_inside(2 * kMiB, stream.get());
  drop(scratch);
  const std::vector<PenstockBlock> first = blocks();
  ASSERT_EQ(first.size(), 2U);
  drop(result);
  drop(other);
  void* second = take_inside(kFrame / 2);
  void* third = take_inside(512);
  const std::vector<PenstockBlock> later = blocks();
  const std::size_t frames = setup_.used_frames();

  penstock_restore_pool(kDevice, kPool, first);
  EXPECT_EQ(addresses(), (std::set<void*>{result, other}));
  EXPECT_EQ(blocks()[0].size + blocks()[1].size, 3000 + 2 * kMiB);
  void* again = take_inside(kFrame / 2);  // beside them, never on them
  const auto* begin = static_cast<std::byte*>(again);
  for (const PenstockBlock& block : first) {
    const auto* start = static_cast<std::byte*>(block.address);
    EXPECT_TRUE(start + block.block_size <= begin || begin + kFrame / 2 <= start);
  }
  penstock_restore_pool(kDevice, kPool, later);
  EXPECT_EQ(addresses(), (std::set<void*>{second, third}));
  penstock_restore_pool(kDevice, kPool, later);  // there already
  EXPECT_EQ(addresses(), (std::set<void*>{second, third}));
  EXPECT_EQ(setup_.used_frames(), frames);
  EXPECT_TRUE(setup_.balanced());
  penstock_restore_pool(kDevice, kPool, {});
  EXPECT_TRUE(addresses().empty());
  const SideStats all = setup_.allocator->stats().side(Side::kAll);
  EXPECT_EQ(all.allocation.current, 0);
  EXPECT_EQ(all.active_bytes.current, 0);
  penstock_release_pool(kDevice, kPool);
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 0U);
}

TEST_F(TorchPool, ACheckpointWaitsForStreamsThatUseWhatItFrees) {
  const OwnedStream stream(setup_.spy);
  LateWriter writer;
  void* block = take_inside(2 * kFrame);
  const std::vector<PenstockBlock> wanted = blocks();
  drop(block);
  void* two = take_inside(kFrame);
  EXPECT_EQ(two, block);
  penstock_record_stream(two, stream.get().value);
  writer.write(two, kFrame, stream.get(), std::chrono::milliseconds(20));
  penstock_restore_pool(kDevice, kPool, wanted);
  writer.write(block, 2 * kFrame, kHere);
  setup_.spy->synchronize();
  EXPECT_EQ(writer.wrong(), 0U);
  EXPECT_EQ(addresses(), std::set<void*>{block});
  penstock_restore_pool(kDevice, kPool, {});
}

TEST_F(TorchPool, ACheckpointOfMemoryThatIsGoneIsRefusedAndTakesNothing) {
  void* block = take_inside(kFrame);
  const std::vector<PenstockBlock> wanted = blocks();
  drop(block);
  penstock_release_pool(kDevice, kPool);
  penstock_empty_cache();
  try {
    penstock_restore_pool(kDevice, kPool, wanted);
    FAIL() << "its frames are gone";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("pool (4, 0): 2.00 MiB"), std::string::npos)
        << error.what();
  }
  EXPECT_TRUE(addresses().empty());
  EXPECT_THROW(penstock_restore_pool(kDevice + 1, kPool, {}), std::runtime_error);
  EXPECT_TRUE(setup_.balanced());
}

// Blocks come and go at random, and checkpoints with them.
TEST_F(TorchPool, CheckpointsOfRandomStatesAreRestoredExactly) {
  std::mt19937 random(7);
  std::vector<std::vector<PenstockBlock>> checkpoints = {{}};
  std::set<void*> live;
  for (int step = 0; step < 4000; ++step) {
    const auto action = random() % 100;
    if (action < 50) {
      try {
        live.insert(take_inside(1 + random() % (random() % 8 == 0 ? kMiB + kFrame / 2 : 9000)));
      } catch (const std::runtime_error&) {
      }
    } else if (action < 90 && !live.empty()) {
      drop(*live.begin());
      live.erase(live.begin());
    } else if (action < 95) {
      checkpoints.push_back(blocks());
    } else {
      const auto& wanted = checkpoints[random() % checkpoints.size()];
      penstock_restore_pool(kDevice, kPool, wanted);
      live.clear();
      for (const PenstockBlock& block : wanted) live.insert(block.address);
    }
    ASSERT_EQ(addresses(), live) << step;
    ASSERT_TRUE(setup_.balanced()) << step;
  }
  EXPECT_GT(checkpoints.size(), 50U);
  for (void* address : live) drop(address);
  penstock_release_pool(kDevice, kPool);
  penstock_empty_cache();
  EXPECT_EQ(setup_.used_frames(), 0U);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
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
  penstock_delete(block);
  EXPECT_TRUE(other.allocator->live_blocks().empty());
  penstock_delete(block);  // nobody's any more
  EXPECT_EQ(other.device->calls()["event_record"], 1U);
  EXPECT_EQ(setup_.device->suppressed_count(), 0U);
  other.spy->synchronize();
  setup_.spy->synchronize();
  torch_allocator::uninstall(kDevice + 1);
}

}  // namespace
}  // namespace penstock
