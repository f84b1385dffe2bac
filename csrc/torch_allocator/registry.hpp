// Which allocator serves which device. Looking up is one atomic read, since each request of torch
// does it; changing takes a lock. Entries are never destroyed at the end of the process: tensors of
// static objects may be freed after everything else is gone. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>

#include "allocator/caching_allocator.hpp"
#include "torch_allocator/torch_allocator.hpp"

namespace penstock::torch_allocator {

class Registry {
 public:
  static constexpr int kMostDevices = 64;

  /// The one of the process.
  static Registry& get();

  CachingAllocator* find(int ordinal) const noexcept {
    if (ordinal < 0 || ordinal >= kMostDevices) return nullptr;
    return allocators_[static_cast<std::size_t>(ordinal)].load(std::memory_order_acquire);
  }
  template <typename Visit>
  void for_each(Visit visit) const {
    for (const auto& entry : allocators_) {
      if (CachingAllocator* allocator = entry.load(std::memory_order_acquire)) visit(*allocator);
    }
  }

  void install(int ordinal, std::shared_ptr<CachingAllocator> allocator);
  std::shared_ptr<CachingAllocator> uninstall(int ordinal);
  std::shared_ptr<CachingAllocator> shared(int ordinal) const;

  std::atomic<Thrower> thrower{nullptr};

 private:
  Registry() = default;

  std::array<std::atomic<CachingAllocator*>, kMostDevices> allocators_{};
  mutable std::mutex mutex_;
  std::array<std::shared_ptr<CachingAllocator>, kMostDevices> owners_;
};

}  // namespace penstock::torch_allocator
