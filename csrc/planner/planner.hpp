// The planner decides, from the schedule of a pass and the number of frames, which pages stay on
// frames of their own (the resident set), how many frames the others stream through (the ring),
// on which frame of the ring each of them is mapped, in which order they are loaded, and what a
// pass will then cost. It is a pure function: no device, no clock, the same plan for the same
// input.
//
// The model it plans by. A pass is a cycle of steps; step i computes for `step_seconds[i]` and
// reads its pages; the end of a pass wraps around into the next. Copies run one after the other, a
// page in `page_size / link_rate`; the copy of a page starts when the copy before it has ended and
// the last step that reads the page now on its frame has ended. A step starts when the step before
// it has ended and all of its pages are in place. Each copy costs kSecondsPerCopy beside its bytes,
// and one that had to wait for a step starts kSecondsPerWait after it.
//
// A page's frame is fixed, so two pages that one step reads are on different frames. Where pages
// are read in several steps and frames are very few, there may be no such choice, although each
// step alone would fit: then the plan is returned with a collision, and `loads` names the pages
// in turn; who runs it has to put one of them on another frame while the step runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "schedule/copy_costs.hpp"
#include "schedule/schedule.hpp"

namespace penstock {

using SlotIndex = std::uint32_t;
inline constexpr SlotIndex kResident = std::numeric_limits<SlotIndex>::max();

struct PlanRequest {
  std::size_t page_count = 0;
  std::size_t page_size = 0;                  ///< Bytes.
  std::vector<std::vector<PageIndex>> steps;  ///< Pages that each step of a pass reads.
  std::vector<double> step_seconds;           ///< Compute time of each step; empty for unknown.
  std::vector<PageIndex> keep;                ///< Pages that have to be resident.
  std::size_t frames = 0;                     ///< Frames for resident set and ring together.
  double link_rate = 0;                       ///< Bytes per second, above 0.
  std::vector<PageIndex> stream;              ///< Pages that must not be, unless they are kept.
  std::size_t least_ring = 0;  ///< Of the ring's frames, as far as there are so many.
};

/// The load of a page for a step.
struct Load {
  PageIndex page;
  StepIndex step;
};

struct Plan {
  std::vector<PageIndex> resident;  ///< Ascending.
  std::size_t ring = 0;             ///< Frames that all other pages share; 0 if there are none.
  std::vector<SlotIndex> slot;      ///< By page: its place in the ring, or kResident.
  std::vector<Load> loads;          ///< Of one pass in steady state, in order.
  std::size_t bytes_per_pass = 0;   ///< loads.size() * page_size.
  double seconds = 0;               ///< Predicted time of a pass in steady state.

  std::size_t frames() const noexcept { return resident.size() + ring; }
};

/// The fewest frames with which the steps can run: the largest step, beside what has to stay; one
/// at least while there is a page that does not have to stay.
/// @throws std::invalid_argument for a request that contradicts itself.
std::size_t least_frames(const PlanRequest& request);

/// If all pages fit, all are resident but those that have to stream: they share a ring that is too
/// small for them. (Where a step reads them all at once there is no such ring, and they stay.)
/// Without steps nothing is known of the use of pages: the first ones stay, beside a ring for the
/// others. Pages that no step reads are resident only if they have to be; they have a place in the
/// ring, to be loaded on demand.
/// @throws CapExceededError where even `least_frames` are more than there are,
///         std::invalid_argument for a request that contradicts itself.
Plan make_plan(const PlanRequest& request);

/// The predicted time of a pass in steady state, by the model above.
double predict_seconds(const PlanRequest& request, const Plan& plan);

}  // namespace penstock
