// What happens when a plan is carried out, pass after pass: which pages have to be loaded, since
// another page took their frame, and how long a pass takes. Pure functions.
#pragma once

#include <cstddef>
#include <vector>

#include "planner/planner.hpp"
#include "planner/reads.hpp"

namespace penstock {

/// The loads of one pass in steady state, in the order in which they are needed. A frame of the
/// ring holds what was read through it last, so the second pass and all later ones are the same.
///
/// @param slot  By page: its frame of the ring, or kResident.
/// @param ring  Frames of the ring.
std::vector<Load> steady_loads(const Reads& reads, const std::vector<SlotIndex>& slot,
                               std::size_t ring);

/// The duration of a pass in steady state; see predict_seconds.
double pass_seconds(const Reads& reads, const PlanRequest& request, const Plan& plan);

}  // namespace penstock
