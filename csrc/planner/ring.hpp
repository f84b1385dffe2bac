// The ring: on which of its frames each streamed page is mapped. Pages take the frames in turn, so
// that a frame is left alone for as long as can be after its page was read, and the copy of the
// next page rarely waits for a step.
#pragma once

#include <cstddef>
#include <vector>

#include "planner/planner.hpp"
#include "planner/reads.hpp"

namespace penstock {

struct Ring {
  std::vector<SlotIndex> slot;       ///< By page; kResident for those that do not stream.
  std::size_t size = 0;              ///< Frames.
  std::vector<PageIndex> colliding;  ///< Pages that share a frame with another page of their step.
};

/// Gives each page that is read and not resident a frame: the one whose last read is the longest
/// ago, among those that no step needs for the page and another one at once.
///
/// Where the number of pages is no multiple of the frames, turns are left out at even distances, so
/// that the end of a pass meets its start a whole round later: of n pages in c = ceil(n / frames)
/// rounds, each frame gets a page again after floor(n / c) others at the earliest.
///
/// @param resident  By page.
/// @param frames    At least 1.
Ring assign_ring(const Reads& reads, const std::vector<bool>& resident, std::size_t frames);

/// Makes pages resident and leaves frames out, together as many frames as before, until no frame
/// of the ring is without use: a page alone on a frame stays there in any case, and a frame with
/// none can hold one more resident page. One frame remains while any page is not resident.
void drop_idle_frames(const Reads& reads, Ring& ring, std::vector<bool>& resident);

}  // namespace penstock
