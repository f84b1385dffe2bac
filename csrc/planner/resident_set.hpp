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

/// How what streams is spread over a pass.
enum class SpreadBy {
  kPages,  ///< Pages at even distances.
  kTime,   ///< In proportion to the time of steps, which has to be known.
  kSteps,  ///< Pages of few steps, at even distances.
};

struct ResidentQuery {
  std::size_t count = 0;         ///< Pages that may stay.
  std::size_t ring = 0;          ///< Frames for the others.
  std::size_t largest_step = 0;  ///< Pages that any one step may stream; at most `ring`.
  SpreadBy spread_by = SpreadBy::kPages;
  std::vector<double> step_seconds;  ///< To spread by time.
};

/// @param forced  By page: pages that have to stay, at most `count`.
/// @return By page whether it is resident: `count` pages, fewer only if fewer are read; nothing
///         where a step would stream more than it may.
std::optional<std::vector<bool>> choose_resident(const Reads& reads,
                                                 const std::vector<bool>& forced,
                                                 const ResidentQuery& query);

/// `count` of them, at even distances.
template <typename Each>
std::vector<Each> spread(const std::vector<Each>& all, std::size_t count) {
  std::vector<Each> chosen;
  chosen.reserve(count);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if ((i + 1) * count / all.size() > i * count / all.size()) chosen.push_back(all[i]);
  }
  return chosen;
}

}  // namespace penstock
