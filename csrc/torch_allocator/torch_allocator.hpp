// The allocator of this process for torch: one CachingAllocator for each device, and the C
// functions that torch.cuda.memory.CUDAPluggableAllocator calls. The signatures are those of
// torch's header CUDAPluggableAllocator.h; its std::pair and std::function arguments are passed as
// the C++ ABI has it, so nothing of torch is included. A stream is a cudaStream_t.
//
// Rules of the functions: they take no lock of Python's and call none of it. penstock_malloc
// throws, because torch does not look for null. What it throws where memory runs out is up to the
// thrower, which somebody who is built against torch installs, so that users see
// torch.OutOfMemoryError; without one, and for other errors, it is std::runtime_error, which torch
// turns into a RuntimeError. penstock_begin_pool throws too where a pool is begun twice: a graph
// that went on with the common pool would share its memory with others; and so do the functions
// that say so below. In all others an error is
// on record with the device (Device::suppress). Thread-safe; installing is for when nobody
// allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "allocator/caching_allocator.hpp"

namespace penstock::torch_allocator {

/// Throws an exception that says that memory ran out, with the message; never returns.
using Thrower = void (*)(const char* message);

/// Makes `allocator` the one of a device. It lives until it is uninstalled, or for ever.
/// @throws std::invalid_argument where there is one already.
void install(int ordinal, std::shared_ptr<CachingAllocator> allocator);

/// Takes the allocator of a device back. @throws std::invalid_argument where there is none, or
/// where it has live blocks, whose owners will still free them.
std::shared_ptr<CachingAllocator> uninstall(int ordinal);

/// The allocator of a device, or null.
std::shared_ptr<CachingAllocator> installed(int ordinal);

/// What is called when memory runs out; null for the default.
void set_thrower(Thrower thrower) noexcept;

}  // namespace penstock::torch_allocator

extern "C" {

using PenstockPoolId = std::pair<unsigned long long, unsigned long long>;
using PenstockStreamFilter = std::function<bool(void*)>;  // as it is with cudaStream_t

/// A live block. Plain data, which who is built against torch declares again.
struct PenstockBlock {
  void* address;
  std::size_t size;        ///< That was asked for.
  std::size_t block_size;  ///< That it takes.
  void* stream;
};

#define PENSTOCK_EXPORT __attribute__((visibility("default"), used))

/// Memory on `device` for work of `stream`; null for no bytes.
PENSTOCK_EXPORT void* penstock_malloc(std::size_t size, int device, void* stream);
/// The same for torch.cuda.MemPool, which looks for null and makes an error of its own of it, and
/// which caches itself: what is freed leaves its frames at once.
PENSTOCK_EXPORT void* penstock_pool_malloc(std::size_t size, int device, void* stream);
PENSTOCK_EXPORT void penstock_pool_free(void* address, std::size_t size, int device, void* stream);
PENSTOCK_EXPORT void penstock_free(void* address, std::size_t size, int device, void* stream);
/// The same for who does not know of which device the address is.
PENSTOCK_EXPORT void penstock_delete(void* address);
PENSTOCK_EXPORT void penstock_record_stream(void* address, void* stream);
/// Gives back cached frames of all devices.
PENSTOCK_EXPORT void penstock_empty_cache();
/// The block that starts at `address` and its size; size 0 where there is none.
PENSTOCK_EXPORT void* penstock_base_alloc(void* address, std::size_t* size);
/// The largest block that could be had without anybody making room, in bytes; whole frames only.
PENSTOCK_EXPORT std::size_t penstock_largest_block(int device);
PENSTOCK_EXPORT void penstock_begin_pool(int device, PenstockPoolId id,
                                         PenstockStreamFilter filter);
PENSTOCK_EXPORT void penstock_end_pool(int device, PenstockPoolId id);
PENSTOCK_EXPORT void penstock_release_pool(int device, PenstockPoolId id);
/// One user more of a pool, as torch.cuda.MemPool is. Throws std::runtime_error where the device
/// has no allocator.
PENSTOCK_EXPORT void penstock_hold_pool(int device, PenstockPoolId id);
PENSTOCK_EXPORT int penstock_pool_uses(int device, PenstockPoolId id);
/// Adds the live blocks of a pool.
PENSTOCK_EXPORT void penstock_pool_blocks(int device, PenstockPoolId id,
                                          std::vector<PenstockBlock>& blocks);
/// Has exactly these blocks live in a pool. Throws std::runtime_error where that cannot be; see
/// CachingAllocator::restore_pool.
PENSTOCK_EXPORT void penstock_restore_pool(int device, PenstockPoolId id,
                                           const std::vector<PenstockBlock>& blocks);
}
