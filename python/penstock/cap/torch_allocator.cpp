// Torch's pluggable allocator, and what it leaves out and programs ask for: how large a block may
// be (cuDNN's benchmark mode), pools of the user's (torch.cuda.MemPool), checkpoints of a pool's
// blocks (torch.compile(mode="reduce-overhead")), and a refusal to share memory with other
// processes. Built against the installed torch where there is a compiler and a CUDA toolkit (see
// torch_allocator.py).
//
// The functions say no `override` where versions of torch differ: what a version does not ask for
// is a function that nobody calls.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using Pluggable = torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator;
using Base = c10::cuda::CUDACachingAllocator::CUDAAllocator;
using State = c10::cuda::CUDACachingAllocator::AllocatorState;
using Delta = c10::cuda::CUDACachingAllocator::CheckpointDelta;
using ShareableHandle = c10::cuda::CUDACachingAllocator::ShareableHandle;
using PoolId = c10::cuda::MempoolId_t;
using Device = c10::DeviceIndex;

// As in csrc/torch_allocator/torch_allocator.hpp.
struct Block {
  void* address;
  std::size_t size;
  std::size_t block_size;
  void* stream;
};
using Blocks = std::vector<Block>;

}  // namespace

// The core's functions, in the order of torch_allocator.py.
struct PenstockFunctions {
  void* (*allocate)(std::size_t, int, cudaStream_t);
  void (*free)(void*, std::size_t, int, cudaStream_t);
  void (*delete_block)(void*);
  std::size_t (*largest_block)(int);
  void (*hold_pool)(int, PoolId);
  int (*pool_uses)(int, PoolId);
  void (*pool_blocks)(int, PoolId, Blocks&);
  void (*restore_pool)(int, PoolId, const Blocks&);
  void (*empty_cache)();
  void* (*base_alloc)(void*, std::size_t*);
  void (*record_stream)(void*, cudaStream_t);
  void (*begin_pool)(int, PoolId, std::function<bool(cudaStream_t)>);
  void (*end_pool)(int, PoolId);
  void (*release_pool)(int, PoolId);
};

namespace {

struct Checkpoint final : State {
  Checkpoint(PoolId pool, Blocks blocks) : pool(pool), blocks(std::move(blocks)) {}
  PoolId pool;
  Blocks blocks;
};

class Allocator final : public Pluggable {
 public:
  explicit Allocator(const PenstockFunctions& functions)
      : Pluggable(functions.allocate, functions.free), core_(functions) {
    set_reset_fn(core_.empty_cache);
    set_base_alloc_fn(core_.base_alloc);
    set_record_stream_fn(core_.record_stream);
    set_begin_allocate_to_pool(core_.begin_pool);
    set_end_allocate_to_pool_fn(core_.end_pool);
    set_release_pool(core_.release_pool);
  }

  // Torch's class keeps the size, device and stream of each block, which the core knows, and a
  // checkpoint could not tell it of blocks that come back.
  c10::DataPtr allocate(std::size_t nbytes) override {
    const Device device = current_device();
    void* address = core_.allocate(nbytes, device, current_stream(device));
    return data_ptr(address, device);
  }
  void* raw_alloc(std::size_t nbytes) override {
    const Device device = current_device();
    return core_.allocate(nbytes, device, current_stream(device));
  }
  void* raw_alloc_with_stream(std::size_t nbytes, cudaStream_t stream) override {
    return core_.allocate(nbytes, current_device(), stream);
  }
  void raw_delete(void* address) override { core_.delete_block(address); }

  void cacheInfo(Device device, std::size_t* largest) override {
    *largest = core_.largest_block(device);
  }

  // Pools.
  void createOrIncrefPool(Device device, PoolId pool, std::shared_ptr<Base> allocator) {
    refuse_other(allocator.get());
    core_.hold_pool(device, pool);
  }
  void createOrIncrefPool(Device device, PoolId pool, Base* allocator) {
    refuse_other(allocator);
    core_.hold_pool(device, pool);
  }
  void ensureExistsAndIncrefPool(Device device, PoolId pool) { core_.hold_pool(device, pool); }
  int getPoolUseCount(Device device, PoolId pool) { return core_.pool_uses(device, pool); }
  // Hints. Room is made by others before a request fails, and blocks share no segments.
  void setUseOnOOM(Device, PoolId, bool) {}
  void setUseOnOOM(Device, PoolId) {}
  void setNoSplit(Device, PoolId) {}

  // Checkpoints. What is freed and taken back is what torch's own allocator tells: all of it.
  bool checkPoolLiveAllocations(Device device, PoolId pool,
                                const std::unordered_set<void*>& expected) {
    const Blocks live = blocks(device, pool);
    for (const Block& block : live) {
      if (expected.count(block.address) == 0) return false;
    }
    return live.size() == expected.size();
  }
  std::shared_ptr<State> getCheckpointState(Device device, PoolId pool) override {
    return std::make_shared<Checkpoint>(pool, blocks(device, pool));
  }
  Delta setCheckpointPoolState(Device device, std::shared_ptr<State> state) override {
    const auto* wanted = dynamic_cast<const Checkpoint*>(state.get());
    TORCH_CHECK(wanted != nullptr, "this is no checkpoint of penstock's allocator");
    Delta delta;
    for (const Block& block : blocks(device, wanted->pool)) {
      delta.ptrs_freed.push_back(block.address);
    }
    core_.restore_pool(device, wanted->pool, wanted->blocks);
    for (const Block& block : wanted->blocks) {
      delta.dataptrs_allocd.push_back(data_ptr(block.address, device));
    }
    return delta;
  }
  bool isHistoryEnabled() { return false; }

  // Other processes.
  ShareableHandle shareIpcHandle(void*) override {
    TORCH_CHECK(false,
                "a tensor under penstock's hard cap cannot be shared with other processes: its "
                "memory is mapped piece by piece. Send a copy: tensor.cpu()");
  }
  std::shared_ptr<void> getIpcDevPtr(std::string) override {
    TORCH_CHECK(false,
                "a tensor of another process cannot be opened under penstock's hard cap: its "
                "memory would not be counted. Have it sent as a copy: tensor.cpu()");
  }

 private:
  static void refuse_other(const Base* allocator) {
    TORCH_CHECK(allocator == nullptr,
                "a pool with an allocator of its own would take memory past penstock's hard cap");
  }
  Blocks blocks(Device device, PoolId pool) const {
    Blocks found;
    core_.pool_blocks(device, pool, found);
    return found;
  }
  c10::DataPtr data_ptr(void* address, Device device) const {
    return {address, address, raw_deleter(), c10::Device(c10::DeviceType::CUDA, device)};
  }
  static Device current_device() {
    Device device = -1;
    C10_CUDA_CHECK(c10::cuda::GetDevice(&device));
    return device;
  }
  static cudaStream_t current_stream(Device device) {
    return c10::cuda::getCurrentCUDAStream(device).stream();
  }

  PenstockFunctions core_;
};

}  // namespace

extern "C" {

// Returns 0, or 1 with the reason.
__attribute__((visibility("default"))) int penstock_change_torch_allocator(
    const PenstockFunctions* functions, char* reason, std::size_t reason_size) {
  try {
    torch::cuda::CUDAPluggableAllocator::changeCurrentAllocator(
        std::make_shared<Allocator>(*functions));
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(reason, reason_size, "%s", error.what());
    return 1;
  }
}
}
