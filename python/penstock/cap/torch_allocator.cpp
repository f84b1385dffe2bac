// Torch's pluggable allocator, and what it leaves out: how large a block may be. cuDNN's benchmark
// mode asks for that, and torch's class refuses. Built against the installed torch where there is a
// compiler and a CUDA toolkit (see torch_allocator.py).
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <memory>

namespace {

using Pluggable = torch::cuda::CUDAPluggableAllocator::CUDAPluggableAllocator;
using PoolId = c10::cuda::MempoolId_t;
using LargestBlock = std::size_t (*)(int device);

class Allocator final : public Pluggable {
 public:
  Allocator(std::function<void*(std::size_t, int, cudaStream_t)> allocate,
            std::function<void(void*, std::size_t, int, cudaStream_t)> free, LargestBlock largest)
      : Pluggable(std::move(allocate), std::move(free)), largest_(largest) {}

  void cacheInfo(c10::DeviceIndex device, std::size_t* largest) override {
    *largest = largest_(device);
  }

 private:
  LargestBlock largest_;
};

}  // namespace

extern "C" {

// The core's functions, in the order of torch_allocator.py.
struct PenstockFunctions {
  void* (*allocate)(std::size_t, int, cudaStream_t);
  void (*free)(void*, std::size_t, int, cudaStream_t);
  LargestBlock largest_block;
  void (*empty_cache)();
  void* (*base_alloc)(void*, std::size_t*);
  void (*record_stream)(void*, cudaStream_t);
  void (*begin_pool)(int, PoolId, std::function<bool(cudaStream_t)>);
  void (*end_pool)(int, PoolId);
  void (*release_pool)(int, PoolId);
};

// Returns 0, or 1 with the reason.
__attribute__((visibility("default"))) int penstock_change_torch_allocator(
    const PenstockFunctions* functions, char* reason, std::size_t reason_size) {
  try {
    auto allocator =
        std::make_shared<Allocator>(functions->allocate, functions->free, functions->largest_block);
    allocator->set_reset_fn(functions->empty_cache);
    allocator->set_base_alloc_fn(functions->base_alloc);
    allocator->set_record_stream_fn(functions->record_stream);
    allocator->set_begin_allocate_to_pool(functions->begin_pool);
    allocator->set_end_allocate_to_pool_fn(functions->end_pool);
    allocator->set_release_pool(functions->release_pool);
    torch::cuda::CUDAPluggableAllocator::changeCurrentAllocator(allocator);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(reason, reason_size, "%s", error.what());
    return 1;
  }
}
}
