// How a page's bytes lie in a buffer that they are read into. Direct reads have aligned offsets,
// and extents start anywhere: so what is read is an aligned superset of what is needed, and the
// page's bytes are found in it, each extent at a place of its own, without being copied again.
// Extents that share a block of the file, or touch, are one read. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "io/fill_job.hpp"

namespace penstock {

/// One call that reads, aligned to kDirectAlignment in file, buffer and size.
struct PageRead {
  std::size_t file;
  std::uint64_t file_offset;
  std::size_t position;  ///< In the buffer.
  std::size_t nbytes;
  std::size_t needed;  ///< The file has to have this many of them.
};

/// Bytes of the page that lie together in the buffer.
struct PagePart {
  std::size_t position;  ///< In the buffer.
  std::size_t offset;    ///< In the page.
  std::size_t nbytes;
};

struct PageLayout {
  std::vector<PageRead> reads;
  std::vector<PagePart> parts;   ///< Ascending by offset.
  std::size_t buffer_bytes = 0;  ///< What the buffer has to have, a multiple of the alignment.
};

/// @param parts      What files have of the page, ascending by region offset.
/// @param start      Of the page in the region.
/// @param most_read  Bytes of one read at most, a multiple of the alignment.
PageLayout lay_out_page(const std::vector<Extent>& parts, std::size_t start, std::size_t most_read);

}  // namespace penstock
