// A slab is one range of anonymous host memory, of huge pages where the system has them, that is
// registered with the device part by part: unlike pinned memory from the driver it can be filled by
// several threads, and be fixed in place while that goes on. It takes exactly the bytes asked for,
// rounded up to a system page, and takes them at the first touch. Registering is thread-safe.
#pragma once

#include <cstddef>
#include <memory>

#include "host_tier/registrations.hpp"

namespace penstock {

class Slab {
 public:
  /// @throws DeviceError where the system has no such range.
  Slab(std::shared_ptr<Device> device, std::size_t nbytes);
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  std::byte* address() const noexcept { return memory_.address; }
  std::size_t nbytes() const noexcept { return memory_.nbytes; }

  /// Registers a range; offset and size are multiples of the system page.
  void register_range(std::size_t offset, std::size_t nbytes);
  std::size_t registered_bytes() const { return registrations_.nbytes(); }

 private:
  struct Memory {
    explicit Memory(std::size_t size);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    std::size_t nbytes;
    std::byte* address;
  };

  Memory memory_;  // goes last: what is registered has to be there
  Registrations registrations_;
};

}  // namespace penstock
