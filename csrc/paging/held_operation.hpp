// What one operation holds: ranges of one or several models, and how each of these holds them.
// It belongs to one thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <vector>

#include "paging/paged_model.hpp"
#include "paging/paging_api.hpp"

namespace penstock {

/// Whether one range lies in another, which may be written to where the first one may.
inline bool lies_in(const PagingRange& range, const PagingRange& held) {
  const auto* const start = static_cast<const std::byte*>(range.address);
  const auto* const held_start = static_cast<const std::byte*>(held.address);
  return start >= held_start && start + range.nbytes <= held_start + held.nbytes &&
         (held.written || !range.written);
}

class HeldOperation {
 public:
  struct Part {
    std::shared_ptr<PagedModel> model;
    PagedModel::Hold hold;
    std::size_t first;  // of its ranges
    std::size_t count;
  };

  PagingOperation operation{};
  std::vector<PagingRange> ranges;
  std::vector<Part> parts;

  bool covers(const PagingRange& range) const {
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const PagingRange& held) { return lies_in(range, held); });
  }

  /// Lets go of all parts; the first failure is thrown when all is done.
  void end() {
    std::exception_ptr failure;
    for (; !parts.empty(); parts.pop_back()) {
      const Part& part = parts.back();
      try {
        part.model->end(part.hold, operation, ranges.data() + part.first, part.count);
      } catch (...) {
        if (!failure) failure = std::current_exception();
      }
    }
    ranges.clear();
    if (failure) std::rethrow_exception(failure);
  }
};

}  // namespace penstock
