#include "device/host/host_memory.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "error/error.hpp"
#include "error/format.hpp"
#include "io/file.hpp"
#include "io/mapping.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace penstock {

namespace {

constexpr std::size_t kAlignment = std::size_t{2} << 20;  // the largest folio the kernel maps whole
constexpr std::size_t kCopyChunk = std::size_t{4} << 20;  // of a file; what it reads at once

bool on_disk(const std::string& directory) {
  struct statfs status{};
  if (::statfs(directory.c_str(), &status) != 0) return false;
  const auto type = static_cast<unsigned long>(status.f_type);
  return type != TMPFS_MAGIC && type != RAMFS_MAGIC && ::access(directory.c_str(), W_OK) == 0;
}

int open_spill(const std::string& directory) {
  const int unnamed = ::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (unnamed >= 0) return unnamed;
  std::string path = directory + "/penstock-spill-XXXXXX";
  const int named = ::mkostemp(path.data(), O_CLOEXEC);
  if (named < 0) {
    throw DeviceError("mkostemp", errno,
                      "cannot create a spill file in " + directory + ": " + std::strerror(errno) +
                          ". Set PENSTOCK_SPILL_DIR to a writable directory on a disk");
  }
  ::unlink(path.c_str());
  return named;
}

[[noreturn]] void refuse_space(int code, std::size_t nbytes, const std::string& directory) {
  throw DeviceError("fallocate", code,
                    "no room for " + format_bytes(nbytes) + " of spill file in " + directory +
                        ": " + std::strerror(code) +
                        ". Free disk space, or set PENSTOCK_SPILL_DIR to another disk");
}

void allocate_space(int descriptor, std::size_t nbytes, const std::string& directory) {
  const auto size = static_cast<off_t>(nbytes);
  if (::ftruncate(descriptor, size) != 0) throw system_error("ftruncate", errno);
  // Asked for more than there is, fallocate() takes all of it before it gives up, and others on
  // the disk would see it full.
  struct statvfs disk{};
  if (::fstatvfs(descriptor, &disk) == 0 && nbytes / disk.f_frsize >= disk.f_bavail) {
    refuse_space(ENOSPC, nbytes, directory);
  }
  if (::fallocate(descriptor, 0, 0, size) != 0 && errno != EOPNOTSUPP) {
    refuse_space(errno, nbytes, directory);
  }
}

void write_all(int descriptor, const char* source, std::uint64_t offset, std::size_t nbytes) {
  while (nbytes > 0) {
    const ssize_t put = ::pwrite(descriptor, source, nbytes, static_cast<off_t>(offset));
    if (put < 0) {
      if (errno == EINTR) continue;
      throw system_error("pwrite to the spill file", errno);
    }
    source += put;
    offset += static_cast<std::uint64_t>(put);
    nbytes -= static_cast<std::size_t>(put);
  }
}

}  // namespace

std::string spill_directory() {
  if (const char* chosen = std::getenv("PENSTOCK_SPILL_DIR");
      chosen != nullptr && *chosen != '\0') {
    if (::access(chosen, W_OK) != 0) {
      throw DeviceError(
          "access", errno,
          std::string("PENSTOCK_SPILL_DIR is ") + chosen + ": " + std::strerror(errno));
    }
    return chosen;
  }
  for (const char* candidate : {"/var/tmp", "/tmp"}) {
    if (on_disk(candidate)) return candidate;
  }
  return "/tmp";
}

HostMemory::~HostMemory() {
  for (const auto& [address, spill] : spills_) {
    ::munmap(reinterpret_cast<void*>(address), spill.nbytes);
    ::close(spill.descriptor);
  }
}

void* HostMemory::reserve(std::size_t nbytes) {
  const std::size_t mapped = round_up(nbytes, system_page());
  const std::string directory = spill_directory();
  const int descriptor = open_spill(directory);
  void* address = nullptr;
  try {
    allocate_space(descriptor, mapped, directory);
    address = reserve_addresses(mapped, kAlignment);
    try {
      map_fixed(address, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
      const std::lock_guard lock(mutex_);
      spills_.emplace(reinterpret_cast<std::uintptr_t>(address), Spill{mapped, descriptor});
    } catch (...) {
      ::munmap(address, mapped);
      throw;
    }
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  return address;
}

void HostMemory::release(void* address) {
  Spill spill{};
  {
    const std::lock_guard lock(mutex_);
    const auto found = spills_.find(reinterpret_cast<std::uintptr_t>(address));
    if (found == spills_.end()) throw std::invalid_argument("managed_release: unknown address");
    spill = found->second;
    spills_.erase(found);
  }
  ::close(spill.descriptor);
  if (::munmap(address, spill.nbytes) != 0) throw system_error("munmap", errno);
}

HostMemory::Place HostMemory::find(const void* address, std::size_t nbytes) {
  const auto start = reinterpret_cast<std::uintptr_t>(address);
  const std::lock_guard lock(mutex_);
  auto after = spills_.upper_bound(start);
  if (after != spills_.begin()) {
    const auto& [base, spill] = *std::prev(after);
    if (start - base <= spill.nbytes && nbytes <= spill.nbytes - (start - base)) {
      return {spill.descriptor, start - base};
    }
  }
  throw std::invalid_argument("the range is not managed memory of this device");
}

void HostMemory::read(void* address, const File& file, std::uint64_t offset, std::size_t nbytes) {
  const Place place = find(address, nbytes);
  std::vector<char> buffer(std::min(kCopyChunk, nbytes));
  for (std::size_t done = 0; done < nbytes;) {
    const std::size_t part = std::min(kCopyChunk, nbytes - done);
    file.read(buffer.data(), offset + done, part);
    write_all(place.descriptor, buffer.data(), place.offset + done, part);
    done += part;
  }
}

void HostMemory::write(void* address, const void* source, std::size_t nbytes) {
  const Place place = find(address, nbytes);
  write_all(place.descriptor, static_cast<const char*>(source), place.offset, nbytes);
}

void HostMemory::populate(void* address, std::size_t nbytes) {
  const std::size_t length = round_up(nbytes, system_page());
  while (::madvise(address, length, MADV_POPULATE_READ) != 0) {
    if (errno == EINTR || errno == EAGAIN) continue;
    if (errno != EINVAL) throw system_error("madvise(MADV_POPULATE_READ)", errno);
    const volatile char* bytes = static_cast<const char*>(address);  // a kernel before 5.14
    for (std::size_t at = 0; at < length; at += system_page()) static_cast<void>(bytes[at]);
    return;
  }
}

void HostMemory::drop(void* address, std::size_t nbytes) {
  if (::madvise(address, round_up(nbytes, system_page()), MADV_DONTNEED) != 0) {
    throw system_error("madvise(MADV_DONTNEED)", errno);
  }
}

std::optional<std::size_t> HostMemory::resident(const void* address, std::size_t nbytes) {
  constexpr std::uint64_t kPresent = std::uint64_t{1} << 63;  // Documentation: mm/pagemap
  const int descriptor = ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return std::nullopt;
  const std::size_t page = system_page();
  std::vector<std::uint64_t> entries(round_up(nbytes, page) / page);
  const std::size_t wanted = entries.size() * sizeof(std::uint64_t);
  const auto first = reinterpret_cast<std::uintptr_t>(address) / page * sizeof(std::uint64_t);
  const ssize_t got = ::pread(descriptor, entries.data(), wanted, static_cast<off_t>(first));
  ::close(descriptor);
  if (got != static_cast<ssize_t>(wanted)) return std::nullopt;
  const auto present = std::count_if(entries.begin(), entries.end(),
                                     [](std::uint64_t entry) { return (entry & kPresent) != 0; });
  return static_cast<std::size_t>(present) * page;
}

}  // namespace penstock
