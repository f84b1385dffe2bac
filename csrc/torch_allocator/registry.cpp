#include "torch_allocator/registry.hpp"

#include <stdexcept>
#include <string>

namespace penstock::torch_allocator {

namespace {

std::string name_of(int ordinal) {
  return "device " + std::to_string(ordinal);
}

}  // namespace

Registry& Registry::get() {
  static Registry* const registry = new Registry;  // leaked on purpose, see the header
  return *registry;
}

void Registry::install(int ordinal, std::shared_ptr<CachingAllocator> allocator) {
  if (ordinal < 0 || ordinal >= kMostDevices) {
    throw std::invalid_argument(name_of(ordinal) + ": an ordinal is below " +
                                std::to_string(kMostDevices));
  }
  if (!allocator) throw std::invalid_argument("no allocator was given");
  const std::lock_guard lock(mutex_);
  const auto i = static_cast<std::size_t>(ordinal);
  if (owners_[i]) {
    throw std::invalid_argument(name_of(ordinal) + " has an allocator already; uninstall it first");
  }
  owners_[i] = std::move(allocator);
  allocators_[i].store(owners_[i].get(), std::memory_order_release);
}

std::shared_ptr<CachingAllocator> Registry::uninstall(int ordinal) {
  const std::lock_guard lock(mutex_);
  CachingAllocator* allocator = find(ordinal);
  if (allocator == nullptr) throw std::invalid_argument(name_of(ordinal) + " has no allocator");
  const std::size_t live = allocator->live_blocks().size();
  if (live > 0) {
    throw std::invalid_argument(name_of(ordinal) + ": " + std::to_string(live) +
                                " blocks of its allocator are in use");
  }
  const auto i = static_cast<std::size_t>(ordinal);
  allocators_[i].store(nullptr, std::memory_order_release);
  return std::move(owners_[i]);
}

std::shared_ptr<CachingAllocator> Registry::shared(int ordinal) const {
  const std::lock_guard lock(mutex_);
  if (ordinal < 0 || ordinal >= kMostDevices) return nullptr;
  return owners_[static_cast<std::size_t>(ordinal)];
}

void install(int ordinal, std::shared_ptr<CachingAllocator> allocator) {
  Registry::get().install(ordinal, std::move(allocator));
}

std::shared_ptr<CachingAllocator> uninstall(int ordinal) {
  return Registry::get().uninstall(ordinal);
}

std::shared_ptr<CachingAllocator> installed(int ordinal) {
  return Registry::get().shared(ordinal);
}

void set_thrower(Thrower thrower) noexcept {
  Registry::get().thrower = thrower;
}

}  // namespace penstock::torch_allocator
