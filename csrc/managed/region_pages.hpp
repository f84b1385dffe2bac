// Sets of pages of one managed region as its pager handles them: ascending, each page once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "managed/managed_region.hpp"

namespace penstock {

// Ascending, each once, and all of them pages of the region: what the rest of the file works with.
inline std::vector<PageIndex> checked(const ManagedRegion& region, std::vector<PageIndex> pages) {
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  if (!pages.empty() && pages.back() >= region.page_count()) {
    throw std::out_of_range("page " + std::to_string(pages.back()) + " of a region of " +
                            std::to_string(region.page_count()) + " pages");
  }
  return pages;
}

inline std::size_t bytes_of(const ManagedRegion& region, const std::vector<PageIndex>& pages) {
  return std::accumulate(
      pages.begin(), pages.end(), std::size_t{0},
      [&](std::size_t sum, PageIndex page) { return sum + region.page_nbytes(page); });
}

inline std::byte* address_of(const ManagedRegion& region, PageIndex page) {
  return region.address() + std::size_t{page} * region.page_size();
}

inline std::size_t run_bytes(const ManagedRegion& region, PageIndex first, std::size_t count) {
  const auto last = static_cast<PageIndex>(first + count - 1);
  return (count - 1) * region.page_size() + region.page_nbytes(last);
}

}  // namespace penstock
