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
  /// @param cache   Whether what is read stays in the page cache.
  /// @throws CheckpointError for a file that cannot be opened or is too short, std::out_of_range
  ///         for an extent outside the tier, std::invalid_argument for extents that overlap or do
  ///         not ascend.
  OpenSource(const Source& source, std::size_t nbytes, PageCache cache);

  std::size_t file_count() const noexcept { return files_.size(); }
  const File& file(std::size_t index) const { return *files_.at(index); }
  const std::vector<Extent>& extents() const noexcept { return extents_; }

  /// What files have of a range of the tier, ascending.
  std::vector<Extent> parts(std::size_t offset, std::size_t nbytes) const;

  /// Whether the files that have some of a range are what they were when they were opened.
  bool is_unchanged(std::size_t offset, std::size_t nbytes) const;
  /// @throws CheckpointError where not.
  void require_unchanged(std::size_t offset, std::size_t nbytes) const;

  /// Copies what files have of a range of the tier.
  /// @throws CheckpointError, also where a file was changed.
  void read(std::size_t offset, std::byte* target, std::size_t nbytes) const;

  /// @throws std::invalid_argument where a file has some of the range.
  void refuse_covered(std::size_t offset, std::size_t nbytes) const;

 private:
  void add(const Extent& extent, std::size_t nbytes);
  /// The first of the parts whose file was changed; null where none was.
  const Extent* find_changed(const std::vector<Extent>& parts) const;

  std::vector<std::unique_ptr<File>> files_;
  std::vector<Extent> extents_;  // ascending by region offset, none empty
};

}  // namespace penstock
