// Checksums of what files gave when it was first loaded, by which a change is noticed that left
// their sizes and times alone. Of 64 bits, and fast rather than safe against somebody who means to
// deceive: a page in which one word of eight bytes differs always has another one. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>

#include "host_tier/open_source.hpp"

namespace penstock {

std::uint64_t checksum(const std::byte* bytes, std::size_t nbytes) noexcept;

class Checksums {
 public:
  /// Compares a range that starts at `offset` of the tier with what it was the first time, extent
  /// by extent; a range that was not seen yet is noted.
  /// @throws CheckpointError naming the file and the first byte of the extent that differs.
  void verify(const OpenSource& source, std::size_t offset, const std::byte* bytes,
              std::size_t nbytes);

 private:
  std::unordered_map<std::size_t, std::uint64_t> sums_;  // by offset in the tier
};

}  // namespace penstock
