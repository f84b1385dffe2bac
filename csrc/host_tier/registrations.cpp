#include "host_tier/registrations.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace penstock {

Registrations::Registrations(std::shared_ptr<Device> device) : device_(std::move(device)) {}

Registrations::~Registrations() {
  for (auto address = addresses_.rbegin(); address != addresses_.rend(); ++address) {
    try {
      device_->host_unregister(*address);
    } catch (const std::exception& error) {
      device_->suppress(error.what());
    }
  }
}

void Registrations::add(void* address, std::size_t nbytes, HostAccess access) {
  {
    const std::lock_guard lock(mutex_);
    addresses_.push_back(address);  // before: nothing may fail once the range is registered
  }
  try {
    device_->host_register(address, nbytes, access);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    addresses_.erase(std::find(addresses_.begin(), addresses_.end(), address));
    throw;
  }
  const std::lock_guard lock(mutex_);
  nbytes_ += nbytes;
}

std::size_t Registrations::nbytes() const {
  const std::lock_guard lock(mutex_);
  return nbytes_;
}

}  // namespace penstock
