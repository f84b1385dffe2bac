// Managed memory of the host device. A range is a shared mapping of an unlinked spill file: its
// bytes are written to the file without touching the mapping, the operating system pages them in on
// access, prefetching populates the mapping, and evicting drops the pages from the process. Nothing
// written through the mapping is lost, and an evicted page read again is right, at any time.
//
// Why not map the checkpoint itself: its tensors lie at any offset, and matrix libraries on CPUs
// choose their order of summation by the address, so results would differ in the last bits from the
// same model in ordinary memory. The spill file holds them aligned.
//
// The spill file lies in $PENSTOCK_SPILL_DIR, else in the first of /var/tmp and /tmp that is on a
// disk (evicting to a memory file system would free nothing). Its space is allocated up front, so
// that a full disk is an error here, not a signal later. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

namespace penstock {

class File;

/// Where spill files go. @throws DeviceError if $PENSTOCK_SPILL_DIR cannot be used.
std::string spill_directory();

class HostMemory {
 public:
  HostMemory() = default;
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  void* reserve(std::size_t nbytes);
  void release(void* address);
  void read(void* address, const File& file, std::uint64_t offset, std::size_t nbytes);
  void write(void* address, const void* source, std::size_t nbytes);
  void populate(void* address, std::size_t nbytes);
  void drop(void* address, std::size_t nbytes);
  std::optional<std::size_t> resident(const void* address, std::size_t nbytes);

 private:
  struct Spill {
    std::size_t nbytes;  // as mapped: whole system pages
    int descriptor;
  };
  struct Place {
    int descriptor;
    std::uint64_t offset;
  };
  Place find(const void* address, std::size_t nbytes);

  std::mutex mutex_;
  std::map<std::uintptr_t, Spill> spills_;
};

}  // namespace penstock
