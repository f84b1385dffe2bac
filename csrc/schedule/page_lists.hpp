// Lists of one region's pages: in runs of consecutive ones, each of which is one call to the
// device; and each once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "schedule/schedule.hpp"

namespace penstock {

/// Calls `visit(first, count)` for each run of consecutive indices.
template <typename Visit>
void for_each_run(const std::vector<PageIndex>& pages, Visit visit) {
  for (std::size_t i = 0; i < pages.size();) {
    std::size_t n = 1;
    while (i + n < pages.size() && pages[i + n] == pages[i] + n) ++n;
    visit(pages[i], n);
    i += n;
  }
}

/// Appends an item unless it is there.
template <typename T>
void push_unique(std::vector<T>& items, const T& item) {
  if (std::find(items.begin(), items.end(), item) == items.end()) items.push_back(item);
}

}  // namespace penstock
