// The few mapping calls that the host device's managed memory and frames share.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "error/error.hpp"

namespace penstock {

inline std::size_t system_page() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

inline void map_fixed(void* address, std::size_t nbytes, int protection, int flags, int descriptor,
                      std::uint64_t offset) {
  if (::mmap(address, nbytes, protection, flags | MAP_FIXED, descriptor,
             static_cast<off_t>(offset)) == MAP_FAILED) {
    throw system_error("mmap", errno);
  }
}

/// Addresses without memory behind them, aligned as asked; the caller unmaps them.
inline void* reserve_addresses(std::size_t nbytes, std::size_t alignment) {
  const std::size_t padded = nbytes + alignment;
  void* raw =
      ::mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) throw system_error("mmap", errno);
  const auto start = reinterpret_cast<std::uintptr_t>(raw);
  const std::uintptr_t aligned = round_up(start, alignment);
  if (aligned > start) ::munmap(raw, aligned - start);
  const std::size_t tail = start + padded - (aligned + nbytes);
  if (tail > 0) ::munmap(reinterpret_cast<void*>(aligned + nbytes), tail);
  return reinterpret_cast<void*>(aligned);
}

}  // namespace penstock
