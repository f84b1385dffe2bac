#include "host_tier/open_source.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error/error.hpp"

namespace penstock {

namespace {

std::string range_text(std::uint64_t start, std::size_t nbytes) {
  return "bytes [" + std::to_string(start) + ", " + std::to_string(start) + " + " +
         std::to_string(nbytes) + ")";
}

}  // namespace

OpenSource::OpenSource(const Source& source, std::size_t nbytes, PageCache cache) {
  for (const auto& path : source.paths) files_.push_back(std::make_unique<File>(path, cache));
  for (const Extent& extent : source.extents) add(extent, nbytes);
}

void OpenSource::add(const Extent& extent, std::size_t nbytes) {
  const File& source = file(extent.file);
  if (extent.region_offset > nbytes || extent.nbytes > nbytes - extent.region_offset) {
    throw std::out_of_range(range_text(extent.region_offset, extent.nbytes) +
                            " leave the host tier of " + std::to_string(nbytes) + " bytes");
  }
  if (extent.file_offset > source.size() || extent.nbytes > source.size() - extent.file_offset) {
    throw CheckpointError(source.path() + " has " + std::to_string(source.size()) + " bytes, but " +
                              range_text(extent.file_offset, extent.nbytes) +
                              " are needed: was it truncated?",
                          source.path(), extent.file_offset);
  }
  if (extent.nbytes == 0) return;
  if (!extents_.empty()) {
    Extent& last = extents_.back();
    const std::size_t end = last.region_offset + last.nbytes;
    if (extent.region_offset < end) {
      throw std::invalid_argument("the extent at " + std::to_string(extent.region_offset) +
                                  " starts before the one ahead of it ends, at " +
                                  std::to_string(end));
    }
    if (extent.region_offset == end && extent.file == last.file &&
        extent.file_offset == last.file_offset + last.nbytes) {
      last.nbytes += extent.nbytes;
      return;
    }
  }
  extents_.push_back(extent);
}

std::vector<Extent> OpenSource::parts(std::size_t offset, std::size_t nbytes) const {
  std::vector<Extent> found;
  const std::size_t end = offset + nbytes;
  auto extent = std::upper_bound(
      extents_.begin(), extents_.end(), offset,
      [](std::size_t at, const Extent& other) { return at < other.region_offset + other.nbytes; });
  for (; extent != extents_.end() && extent->region_offset < end; ++extent) {
    const std::size_t start = std::max(offset, extent->region_offset);
    const std::size_t stop = std::min(end, extent->region_offset + extent->nbytes);
    found.push_back(
        {extent->file, extent->file_offset + (start - extent->region_offset), start, stop - start});
  }
  return found;
}

void OpenSource::read(std::size_t offset, std::byte* target, std::size_t nbytes) const {
  for (const Extent& part : parts(offset, nbytes)) {
    file(part.file).read(target + (part.region_offset - offset), part.file_offset, part.nbytes);
  }
}

const Extent* OpenSource::find_changed(const std::vector<Extent>& parts) const {
  const File* known = nullptr;
  for (const Extent& part : parts) {
    const File& from = file(part.file);
    if (&from != known && !from.is_unchanged()) return &part;
    known = &from;
  }
  return nullptr;
}

bool OpenSource::is_unchanged(std::size_t offset, std::size_t nbytes) const {
  return find_changed(parts(offset, nbytes)) == nullptr;
}

void OpenSource::require_unchanged(std::size_t offset, std::size_t nbytes) const {
  const std::vector<Extent> found = parts(offset, nbytes);
  const Extent* changed = find_changed(found);
  if (changed != nullptr) file(changed->file).require_unchanged(changed->file_offset);
}

void OpenSource::refuse_covered(std::size_t offset, std::size_t nbytes) const {
  const auto covered = nbytes > 0 ? parts(offset, nbytes) : std::vector<Extent>{};
  if (covered.empty()) return;
  const Extent& first = covered.front();
  throw std::invalid_argument(range_text(first.region_offset, first.nbytes) + " come from " +
                              file(first.file).path() +
                              " and cannot be written here: host=\"pinned\" can change them");
}

}  // namespace penstock
