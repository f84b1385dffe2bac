// Plans on trial: complete plans for a given choice of resident pages or of the ring's size, with
// what it takes to compare them. Holds the reads and the request by reference; immutable.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include "planner/planner.hpp"
#include "planner/reads.hpp"
#include "planner/resident_set.hpp"

namespace penstock {

struct Draft {
  Plan plan;
  double cost = 0;             ///< Seconds of a pass, and what its steps cost the host.
  std::size_t room = 0;        ///< Frames of the ring beyond the largest step's streamed pages.
  std::size_t collisions = 0;  ///< Reads of a page whose frame another page of the step has.
};

class Drafter {
 public:
  Drafter(const PlanRequest& request, const Reads& reads) : request_(request), reads_(reads) {}

  Draft with_all_resident() const;

  /// With what is kept and the first pages, beside a ring of so many frames.
  Draft with_first_resident(std::size_t ring) const;

  /// With what is kept and all that is read; the ring is what is left.
  Draft with_all_read_resident() const;

  /// With the best resident set for a ring. Its own may be smaller, where frames would be idle.
  /// @return Nothing where a step would stream more than it may.
  std::optional<Draft> with_ring(const ResidentQuery& query) const;

 private:
  Draft finish(const std::vector<bool>& resident, std::vector<SlotIndex> slot,
               std::size_t ring) const;
  std::size_t largest_streamed(const Plan& plan) const;
  std::size_t streaming_steps(const Plan& plan) const;
  std::size_t collisions_of(const Plan& plan) const;

  const PlanRequest& request_;
  const Reads& reads_;
};

}  // namespace penstock
