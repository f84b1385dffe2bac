#include "host_tier/slab.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "io/mapping.hpp"

namespace penstock {

namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::byte* map_memory(std::size_t nbytes) {
  void* reserved = nullptr;
  try {
    reserved = reserve_addresses(nbytes, kHugePage);
    map_fixed(reserved, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  } catch (const DeviceError& error) {
    if (reserved != nullptr) ::munmap(reserved, nbytes);
    throw DeviceError(error.call, error.code,
                      "no " + format_bytes(nbytes) +
                          " of host memory: " + std::strerror(error.code) +
                          ". host=\"stream\" needs only a ring of buffers");
  }
  ::madvise(reserved, nbytes, MADV_HUGEPAGE);  // slower without, but right
  return static_cast<std::byte*>(reserved);
}

}  // namespace

Slab::Memory::Memory(std::size_t size)
    : nbytes(round_up(std::max<std::size_t>(size, 1), system_page())),
      address(map_memory(nbytes)) {}

Slab::Memory::~Memory() {
  ::munmap(address, nbytes);
}

Slab::Slab(std::shared_ptr<Device> device, std::size_t nbytes)
    : memory_(nbytes), registrations_(std::move(device)) {}

void Slab::register_range(std::size_t offset, std::size_t nbytes) {
  registrations_.add(address() + offset, nbytes, HostAccess::kReadWrite);
}

}  // namespace penstock
