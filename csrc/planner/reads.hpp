// What a request says, checked and without repetitions: the pages of each step, once each and in
// the order given, the steps of each page, and which pages have to stay, or must not. Immutable and
// shared by all that the planner tries.
#pragma once

#include <cstddef>
#include <vector>

#include "planner/planner.hpp"

namespace penstock {

struct Reads {
  /// @throws std::invalid_argument for a request that contradicts itself.
  explicit Reads(const PlanRequest& request);

  std::vector<std::vector<PageIndex>> pages_of;  ///< By step: each page once, in order of reading.
  std::vector<std::vector<StepIndex>> steps_of;  ///< By page, ascending.
  std::vector<std::size_t> reads_before;         ///< By step: reads of the pass before it.
  std::vector<PageIndex> order;                  ///< Pages that are read, by their first read.
  std::vector<bool> kept;                        ///< By page.
  std::size_t kept_count = 0;
  std::vector<bool> streamed;  ///< By page: whether it may not be resident.
  std::size_t streamed_count = 0;
  std::size_t largest_step = 0;  ///< Pages of the largest step beside those that are kept.

  std::size_t page_count() const noexcept { return kept.size(); }
  std::size_t step_count() const noexcept { return pages_of.size(); }
  std::size_t read_count() const noexcept { return reads_before.back(); }

  /// The fewest frames: the largest step beside what is kept; any page needs one to be read at all.
  std::size_t least_frames() const noexcept;
};

}  // namespace penstock
