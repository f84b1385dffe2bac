#include "allocator/heap.hpp"

#include <algorithm>

namespace penstock {

Block* Heap::take_best(std::size_t nbytes) {
  // Joining what was just freed costs the next requests of those sizes a search each, and saves
  // frames. For small blocks, which are many and fill few frames, it is done where it is needed
  // only.
  if (side_of(nbytes) == Side::kSmall) {
    for (const auto& arena : arenas(nbytes)) {
      if (Block* block = arena->take_best(nbytes)) return block;
    }
  }
  for (const auto& arena : arenas(nbytes)) {
    arena->flush();
    if (Block* block = arena->take_best(nbytes)) return block;
  }
  return nullptr;
}

Growth Heap::plan(std::size_t nbytes) {
  Arenas& known = arenas(nbytes);
  std::optional<Growth> best;
  for (const auto& arena : known) {
    const auto growth = arena->plan(nbytes);
    if (growth && (!best || growth->frames < best->frames)) best = growth;
  }
  if (best) return *best;
  const Side side = side_of(nbytes);
  const std::size_t frames = (nbytes + parts_.frame_size - 1) / parts_.frame_size;
  const std::size_t wanted =
      std::max(arena_bytes_[static_cast<std::size_t>(side)], frames * parts_.frame_size);
  known.push_back(std::make_unique<Arena>(parts_, pool_, stream_, side, wanted));
  return *known.back()->plan(nbytes);
}

}  // namespace penstock
