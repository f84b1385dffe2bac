// Where a fill job puts the bytes that it reads: a region, or a host tier. Implementations are
// thread-safe for ranges that do not overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

class File;

class FillTarget {
 public:
  virtual ~FillTarget() = default;
  /// @throws std::out_of_range where [offset, offset + nbytes) leaves the target.
  virtual void check_range(std::size_t offset, std::size_t nbytes) const = 0;
  /// Puts `nbytes` bytes at `file_offset` of a file at `offset` of the target.
  /// @throws CheckpointError where the file ends early, cannot be read, or was changed.
  virtual void fill_from(const File& file, std::uint64_t file_offset, std::size_t offset,
                         std::size_t nbytes) = 0;

 protected:
  FillTarget() = default;
  FillTarget(const FillTarget&) = default;
  FillTarget& operator=(const FillTarget&) = default;
};

}  // namespace penstock
