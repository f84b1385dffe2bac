#include "host_tier/page_layout.hpp"

#include <algorithm>

#include "io/file.hpp"

namespace penstock {

namespace {

// Neighbouring bytes of a file that are read together.
struct Stretch {
  std::size_t file;
  std::uint64_t start;  // aligned down
  std::uint64_t end;    // what is needed, not aligned
  std::size_t position;
};

std::uint64_t align_down(std::uint64_t offset) {
  return offset / kDirectAlignment * kDirectAlignment;
}

std::uint64_t align_up(std::uint64_t offset) {
  return align_down(offset + kDirectAlignment - 1);
}

void add_reads(PageLayout& layout, const Stretch& stretch, std::size_t most_read) {
  for (std::uint64_t at = stretch.start; at < stretch.end; at += most_read) {
    const auto nbytes =
        std::min<std::size_t>(most_read, static_cast<std::size_t>(align_up(stretch.end) - at));
    const auto needed = std::min<std::size_t>(nbytes, static_cast<std::size_t>(stretch.end - at));
    layout.reads.push_back({stretch.file, at,
                            stretch.position + static_cast<std::size_t>(at - stretch.start), nbytes,
                            needed});
  }
}

}  // namespace

PageLayout lay_out_page(const std::vector<Extent>& parts, std::size_t start,
                        std::size_t most_read) {
  PageLayout layout;
  std::vector<Stretch> stretches;
  for (const Extent& part : parts) {
    const std::uint64_t end = part.file_offset + part.nbytes;
    const bool goes_on = !stretches.empty() && stretches.back().file == part.file &&
                         part.file_offset >= stretches.back().start &&
                         align_down(part.file_offset) <= align_up(stretches.back().end);
    if (!goes_on) {
      stretches.push_back({part.file, align_down(part.file_offset), end, layout.buffer_bytes});
    }
    Stretch& stretch = stretches.back();
    stretch.end = std::max(stretch.end, end);
    layout.buffer_bytes =
        stretch.position + static_cast<std::size_t>(align_up(stretch.end) - stretch.start);
    layout.parts.push_back(
        {stretch.position + static_cast<std::size_t>(part.file_offset - stretch.start),
         part.region_offset - start, part.nbytes});
  }
  for (const Stretch& stretch : stretches) add_reads(layout, stretch, most_read);
  return layout;
}

}  // namespace penstock
