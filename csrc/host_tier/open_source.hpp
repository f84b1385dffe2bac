// A source whose files are open and whose extents are checked: what the tiers that leave bytes in
// files ask where a byte is. Extents that go on both in their file and in the tier are one.
// Immutable, so thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "host_tier/host_tier.hpp"
#include "io/file.hpp"

namespace penstock {

class OpenSource {
 public:
  /// @param nbytes  Of the tier.
  /// @throws CheckpointError for a file that cannot be opened or is too short, std::out_of_range
  ///         for an extent outside the tier, std::invalid_argument for extents that overlap or do
  ///         not ascend.
  OpenSource(const Source& source, std::size_t nbytes);

  std::size_t file_count() const noexcept { return files_.size(); }
  const File& file(std::size_t index) const { return *files_.at(index); }
  const std::vector<Extent>& extents() const noexcept { return extents_; }

  /// What files have of a range of the tier, ascending.
  std::vector<Extent> parts(std::size_t offset, std::size_t nbytes) const;

  /// Copies what files have of a range of the tier. @throws CheckpointError.
  void read(std::size_t offset, std::byte* target, std::size_t nbytes) const;

  /// @throws std::invalid_argument where a file has some of the range.
  void refuse_covered(std::size_t offset, std::size_t nbytes) const;

 private:
  void add(const Extent& extent, std::size_t nbytes);

  std::vector<std::unique_ptr<File>> files_;
  std::vector<Extent> extents_;  // ascending by region offset, none empty
};

}  // namespace penstock
