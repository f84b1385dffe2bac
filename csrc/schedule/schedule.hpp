// The schedule is the table of upcoming operations: the steps of one pass in order and, for each,
// the pages that it reads. It answers when a page is used next, counting on through the end of the
// pass into the next one. Pure and immutable but for the position; not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace penstock {

using PageIndex = std::uint32_t;
using StepIndex = std::uint32_t;

/// Steps since the first step of the first pass: grows by one a step, through all passes.
using StepTime = std::uint64_t;
inline constexpr StepTime kNever = std::numeric_limits<StepTime>::max();

class Schedule {
 public:
  Schedule() = default;

  /// @param page_count  Pages of the region; every index in `steps` is below.
  /// @param steps       Pages read by each step of a pass.
  /// @throws std::out_of_range for a page that does not exist.
  Schedule(std::size_t page_count, std::vector<std::vector<PageIndex>> steps);

  bool empty() const noexcept { return steps_.empty(); }
  std::size_t step_count() const noexcept { return steps_.size(); }
  const std::vector<PageIndex>& pages_of(StepIndex step) const { return steps_.at(step); }

  /// The time of the next occurrence of `step` after `now`; the first pass starts at time 1.
  StepTime time_of(StepIndex step, StepTime now) const;

  /// The first use of `page` strictly after `now`; kNever for a page that no step reads.
  StepTime next_use(PageIndex page, StepTime now) const;

 private:
  std::vector<std::vector<PageIndex>> steps_;
  std::vector<std::vector<StepIndex>> uses_;  // by page, ascending
};

}  // namespace penstock
