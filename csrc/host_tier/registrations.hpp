// Ranges of host memory that are registered with a device. It unregisters them when it goes, the
// last one first; what fails then is recorded with the device. The memory belongs to others and
// outlives it. Thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.hpp"

namespace penstock {

class Registrations {
 public:
  explicit Registrations(std::shared_ptr<Device> device);
  ~Registrations();
  Registrations(const Registrations&) = delete;
  Registrations& operator=(const Registrations&) = delete;

  /// Blocks while the system fixes the range in place. @throws DeviceError; the range is then not
  /// registered.
  void add(void* address, std::size_t nbytes, HostAccess access);
  std::size_t nbytes() const;

 private:
  std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;
  std::vector<void*> addresses_;
  std::size_t nbytes_ = 0;
};

}  // namespace penstock
