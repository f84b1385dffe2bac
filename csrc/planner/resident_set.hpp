// The resident set: which pages stay, given how many may. What has to stay comes first; then, step
// by step, the largest first, as many pages as the ring is too small for; then the pages that would
// have to be loaded several times a pass; and then the others, chosen so that what streams is
// spread over the pass and copies go on while steps compute: page by page, or in whole steps, so
// that few steps have anything to wait for and the host has little to do.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "planner/planner.hpp"
#include "planner/reads.hpp"

namespace penstock {

struct ResidentQuery {
  std::size_t count = 0;             ///< Pages that may stay.
  std::size_t ring = 0;              ///< Frames for the others.
  std::size_t largest_step = 0;      ///< Pages that any one step may stream; at most `ring`.
  std::vector<double> step_seconds;  ///< What to spread by: time; empty to spread by pages.
  bool by_steps = false;             ///< Whether few steps are to have all that streams.
};

/// @param forced  By page: pages that have to stay, at most `count`.
/// @return By page whether it is resident: `count` pages, fewer only if fewer are read; nothing
///         where a step would stream more than it may.
std::optional<std::vector<bool>> choose_resident(const Reads& reads,
                                                 const std::vector<bool>& forced,
                                                 const ResidentQuery& query);

/// `count` of the pages, at even distances.
std::vector<PageIndex> spread(const std::vector<PageIndex>& pages, std::size_t count);

}  // namespace penstock
