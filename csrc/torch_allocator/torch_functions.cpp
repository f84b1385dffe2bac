// The functions that torch calls. They are compiled into the extension itself and not into the
// core: symbols of libraries do not leave it.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "error/error.hpp"
#include "error/format.hpp"
#include "torch_allocator/registry.hpp"
#include "torch_allocator/torch_allocator.hpp"

namespace penstock::torch_allocator {

namespace {

constexpr int kCudaOutOfMemory = 2;  // of cudaError_t and of CUresult
// How torch's own message begins, up to the bytes: those who retry with less know it by that.
constexpr const char* kOutOfMemory = "CUDA out of memory. ";

[[noreturn]] void fail(const std::string& message) {
  if (const Thrower thrower = Registry::get().thrower.load()) thrower(message.c_str());
  throw std::runtime_error(message);
}

// Runs `call`; what goes wrong is on record with the allocator's device.
template <typename Call>
void quietly(CachingAllocator& allocator, Call call) noexcept {
  try {
    call();
  } catch (const std::exception& error) {
    allocator.pool()->device()->suppress(error.what());
  } catch (...) {
    allocator.pool()->device()->suppress("unknown error in a hook of torch");
  }
}

template <typename Call>
void quietly(int device, Call call) noexcept {
  CachingAllocator* allocator = Registry::get().find(device);
  if (allocator != nullptr) quietly(*allocator, [&] { call(*allocator); });
}

PoolId pool_id(PenstockPoolId id) noexcept {
  return {id.first, id.second};
}

CachingAllocator& required(int device) {
  CachingAllocator* allocator = Registry::get().find(device);
  if (allocator != nullptr) return *allocator;
  throw std::runtime_error("device " + std::to_string(device) +
                           " has no hard cap, and another one has: call penstock.set_cap for it "
                           "too");
}

// The allocator that handed an address out, where torch does not say for which device it was.
CachingAllocator* owner_of(const void* address) {
  CachingAllocator* only = nullptr;
  int count = 0;
  CachingAllocator* owner = nullptr;
  Registry::get().for_each([&](CachingAllocator& allocator) {
    only = &allocator;
    ++count;
  });
  if (count == 1) return only;
  Registry::get().for_each([&](CachingAllocator& allocator) {
    if (owner == nullptr && allocator.find_block(address)) owner = &allocator;
  });
  return owner;
}

}  // namespace

}  // namespace penstock::torch_allocator

using namespace penstock;
using namespace penstock::torch_allocator;

void* penstock_malloc(std::size_t size, int device, void* stream) {
  std::string message;
  bool out_of_memory = false;
  try {
    return required(device).allocate(size, {stream});
  } catch (const CapExceededError& error) {
    message = std::string(kOutOfMemory) + error.what();
    out_of_memory = true;
  } catch (const DeviceError& error) {
    out_of_memory = error.code == kCudaOutOfMemory;
    if (out_of_memory) {
      message = std::string(kOutOfMemory) + "Tried to allocate " + format_bytes(size) + ": ";
    }
    message += error.what();
  } catch (const std::exception& error) {
    message = error.what();
  }
  // Thrown here and not above, where the error that is being handled would still be alive.
  if (out_of_memory) fail(message);
  throw std::runtime_error(message);
}

void* penstock_pool_malloc(std::size_t size, int device, void* stream) {
  void* address = nullptr;
  quietly(device, [&](CachingAllocator& allocator) {
    try {
      address = allocator.allocate(size, {stream});
    } catch (const CapExceededError&) {  // torch tells
    }
  });
  return address;
}

void penstock_pool_free(void* address, std::size_t /*size*/, int device, void* /*stream*/) {
  quietly(device, [&](CachingAllocator& allocator) {
    allocator.free(address);
    allocator.empty_cache();
  });
}

void penstock_free(void* address, std::size_t /*size*/, int device, void* /*stream*/) {
  quietly(device, [&](CachingAllocator& allocator) { allocator.free(address); });
}

void penstock_delete(void* address) {
  CachingAllocator* allocator = owner_of(address);
  if (allocator == nullptr) return;
  quietly(*allocator, [&] { allocator->free(address); });
}

void penstock_record_stream(void* address, void* stream) {
  CachingAllocator* allocator = owner_of(address);
  if (allocator == nullptr) return;
  quietly(*allocator, [&] { allocator->record_stream(address, {stream}); });
}

void penstock_empty_cache() {
  Registry::get().for_each(
      [](CachingAllocator& allocator) { quietly(allocator, [&] { allocator.empty_cache(); }); });
}

void* penstock_base_alloc(void* address, std::size_t* size) {
  if (size != nullptr) *size = 0;
  CachingAllocator* allocator = owner_of(address);
  if (allocator == nullptr) return address;
  quietly(*allocator, [&] {
    const auto block = allocator->find_block(address);
    if (block && size != nullptr) *size = block->nbytes;
  });
  return address;
}

std::size_t penstock_largest_block(int device) {
  std::size_t largest = 0;
  quietly(device, [&](CachingAllocator& allocator) {
    const AllocatorStats stats = allocator.stats();
    const SideStats& all = stats.side(Side::kAll);
    const std::int64_t cached =
        all.reserved_bytes.current - all.active_bytes.current - all.inactive_split_bytes.current;
    const std::size_t frame_size = allocator.pool()->frame_size();
    const std::size_t frames =
        static_cast<std::size_t>(std::max<std::int64_t>(cached, 0)) / frame_size +
        allocator.pool()->budget().available() / frame_size;
    largest = frames * frame_size;
  });
  return largest;
}

void penstock_begin_pool(int device, PenstockPoolId id, PenstockStreamFilter filter) {
  CachingAllocator* allocator = Registry::get().find(device);
  if (allocator == nullptr) return;
  allocator->begin_pool(pool_id(id), [filter = std::move(filter)](StreamHandle stream) {
    return filter(stream.value);
  });
}

void penstock_end_pool(int device, PenstockPoolId id) {
  quietly(device, [&](CachingAllocator& allocator) { allocator.end_pool(pool_id(id)); });
}

void penstock_release_pool(int device, PenstockPoolId id) {
  quietly(device, [&](CachingAllocator& allocator) { allocator.release_pool(pool_id(id)); });
}

void penstock_hold_pool(int device, PenstockPoolId id) {
  required(device).hold_pool(pool_id(id));
}

int penstock_pool_uses(int device, PenstockPoolId id) {
  CachingAllocator* allocator = Registry::get().find(device);
  return allocator == nullptr ? 0 : static_cast<int>(allocator->pool_uses(pool_id(id)));
}

void penstock_pool_blocks(int device, PenstockPoolId id, std::vector<PenstockBlock>& blocks) {
  for (const LiveBlock& block : required(device).live_blocks()) {
    if (!(block.pool == pool_id(id))) continue;
    blocks.push_back({block.address, block.requested, block.nbytes, block.stream.value});
  }
}

void penstock_restore_pool(int device, PenstockPoolId id,
                           const std::vector<PenstockBlock>& blocks) {
  std::vector<LiveBlock> wanted;
  for (const PenstockBlock& block : blocks) {
    wanted.push_back({block.address, block.block_size, block.size, {block.stream}, 0, pool_id(id)});
  }
  try {
    required(device).restore_pool(pool_id(id), wanted);
  } catch (const std::exception& error) {
    throw std::runtime_error(error.what());  // of a type that torch's libraries know too
  }
}
