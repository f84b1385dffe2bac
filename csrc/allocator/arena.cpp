#include "allocator/arena.hpp"

#include <algorithm>
#include <exception>
#include <iterator>

namespace penstock {

Arena::Arena(ArenaParts& parts, BlockPool& pool, StreamHandle stream, Side side, std::size_t nbytes)
    : parts_(parts), pool_(pool), stream_(stream), side_(side), memory_(parts.device, nbytes) {
  first_ = parts_.slab.take();
  first_->start = memory_.address();
  first_->nbytes = nbytes;
  first_->arena = this;
  unmapped_.insert(first_);
}

Arena::~Arena() {
  for (std::size_t i = 0; i < frames_.size(); ++i) {
    if (!frames_[i]) continue;
    try {
      parts_.device->unmap(frame_address(i), parts_.frame_size);
    } catch (const std::exception& error) {
      parts_.device->suppress(error.what());
    }
  }
  for (Block* block = first_; block != nullptr;) {
    Block* after = block->after;
    parts_.slab.give(block);
    block = after;
  }
}

// ---- borders of blocks -------------------------------------------------------------------------

// Cuts a block after `nbytes`. @return the upper part, in the same state.
Block* Arena::split(Block* block, std::size_t nbytes) {
  Block* upper = parts_.slab.take();
  upper->start = block->start + nbytes;
  upper->nbytes = block->nbytes - nbytes;
  upper->arena = this;
  upper->sequence = block->sequence;
  upper->state = block->state;
  upper->before = block;
  upper->after = block->after;
  if (upper->after != nullptr) upper->after->before = upper;
  block->after = upper;
  block->nbytes = nbytes;
  return upper;
}

Block* Arena::join(Block* lower, Block* upper) noexcept {
  lower->nbytes += upper->nbytes;
  lower->sequence = std::max(lower->sequence, upper->sequence);
  lower->after = upper->after;
  if (lower->after != nullptr) lower->after->before = lower;
  parts_.slab.give(upper);
  return lower;
}

// Gives a block a state, and joins it with its neighbours of that state, which are in `known`.
template <typename Known>
Block* Arena::settle_as(BlockState state, Block* block, Known& known) {
  block->state = state;
  if (block->before != nullptr && block->before->state == state) {
    known.erase(block->before);
    block = join(block->before, block);
  }
  if (block->after != nullptr && block->after->state == state) {
    known.erase(block->after);
    block = join(block, block->after);
  }
  known.insert(block);
  return block;
}

Block* Arena::make_free(Block* block) {
  return settle_as(BlockState::kFree, block, free_);
}

void Arena::make_unmapped(Block* block) {
  settle_as(BlockState::kUnmapped, block, unmapped_)->sequence = 0;
}

Block* Arena::carve(Block* block, std::byte* start, std::size_t nbytes) {
  free_.erase(block);
  if (start > block->start) {
    Block* upper = split(block, static_cast<std::size_t>(start - block->start));
    free_.insert(block);
    block = upper;
  }
  if (block->nbytes > nbytes) free_.insert(split(block, nbytes));
  block->state = BlockState::kLive;
  parts_.blocks.insert(block);
  return block;
}

Block* Arena::take_best(std::size_t nbytes) {
  const auto best = free_.lower_bound(nbytes);
  return best == free_.end() ? nullptr : carve(*best, (*best)->start, nbytes);
}

Block* Arena::find_free(const std::byte* start, std::size_t nbytes) const noexcept {
  for (Block* block : free_) {
    if (block->start <= start && start + nbytes <= block->end()) return block;
  }
  return nullptr;
}

Block* Arena::take_at(std::byte* start, std::size_t nbytes) {
  return carve(find_free(start, nbytes), start, nbytes);
}

void Arena::settle(Block* quick) {
  parts_.blocks.erase(quick);
  make_free(quick);
}

void Arena::give(Block* block, std::uint64_t sequence) {
  block->state = BlockState::kQuick;
  block->sequence = sequence;
  for (Block* done = quick_.put(block); done != nullptr;) {
    Block* next = done->next;
    settle(done);
    done = next;
  }
}

void Arena::flush() {
  quick_.drain([this](Block* block) { settle(block); });
}

// ---- more frames -------------------------------------------------------------------------------

std::size_t Arena::missing_frames(const Run& run, const std::byte* start,
                                  std::size_t nbytes) const {
  std::size_t missing = 0;
  for (const Block* block : run) {
    if (block->state != BlockState::kUnmapped) continue;
    const std::byte* low = std::max<const std::byte*>(start, block->start);
    const std::byte* high = std::min<const std::byte*>(start + nbytes, block->end());
    if (low < high) missing += frames_to(high) - frame_index(low);
  }
  return missing;
}

// A place is worth a look if it starts or ends where mapped memory does, or starts where the run
// does: moving it from there only adds frames.
void Arena::plan_in(const Run& run, std::size_t nbytes, std::optional<Growth>& best) const {
  std::byte* const low = run.front()->start;
  std::byte* const high = run.back()->end();
  if (static_cast<std::size_t>(high - low) < nbytes) return;
  const auto consider = [&](std::byte* start) {
    if (start < low || start > high - nbytes) return;
    const std::size_t missing = missing_frames(run, start, nbytes);
    if (best && (missing > best->frames || (missing == best->frames && start >= best->start))) {
      return;
    }
    best = Growth{const_cast<Arena*>(this), start, nbytes, missing};
  };
  consider(low);
  for (const Block* block : run) {
    if (block->state != BlockState::kFree) continue;
    consider(block->start);
    if (static_cast<std::size_t>(block->end() - low) >= nbytes) consider(block->end() - nbytes);
  }
}

std::optional<Growth> Arena::plan(std::size_t nbytes) const {
  const auto vacant = [](const Block* block) {
    return block->state == BlockState::kFree || block->state == BlockState::kUnmapped;
  };
  std::optional<Growth> best;
  const std::byte* seen = nullptr;  // runs up to here
  Run run;
  for (const Block* gap : unmapped_) {
    if (gap->start < seen) continue;
    const Block* first = gap;
    while (first->before != nullptr && vacant(first->before)) first = first->before;
    run.clear();
    for (const Block* at = first; at != nullptr && vacant(at); at = at->after) run.push_back(at);
    seen = run.back()->end();
    plan_in(run, nbytes, best);
  }
  return best;
}

void Arena::count_frames(std::size_t before) noexcept {
  const std::size_t more = mapped_ > before ? mapped_ - before : 0;
  const std::size_t fewer = before > mapped_ ? before - mapped_ : 0;
  parts_.stats.num_device_alloc += more;
  parts_.stats.num_device_free += fewer;
  parts_.stats.apply(side_, [&](SideStats& figures) {
    figures.segment.increase(more);
    figures.segment.decrease(fewer);
    figures.reserved_bytes.increase(more * parts_.frame_size);
    figures.reserved_bytes.decrease(fewer * parts_.frame_size);
  });
}

Block* Arena::add_frame(std::byte* at, Frame& frame) {
  const std::size_t index = frame_index(at);
  if (index >= frames_.size()) frames_.resize(index + 1);
  parts_.device->map(at, frame.handle(), parts_.frame_size);
  frames_[index] = std::move(frame);
  ++mapped_;
  const auto found = std::prev(unmapped_.upper_bound(at));
  Block* block = *found;
  unmapped_.erase(found);
  if (at > block->start) {
    Block* upper = split(block, static_cast<std::size_t>(at - block->start));
    unmapped_.insert(block);
    block = upper;
  }
  if (block->nbytes > parts_.frame_size) unmapped_.insert(split(block, parts_.frame_size));
  return make_free(block);
}

Block* Arena::grow(const Growth& growth, std::vector<Frame>& frames) {
  const std::size_t before = mapped_;
  Block* block = nullptr;
  try {
    for (std::size_t i = frame_index(growth.start); i < frames_to(growth.end()); ++i) {
      if (i < frames_.size() && frames_[i]) continue;
      block = add_frame(frame_address(i), frames.back());
      frames.pop_back();
    }
  } catch (...) {
    count_frames(before);
    throw;
  }
  count_frames(before);
  return carve(block, growth.start, growth.nbytes);
}

// ---- fewer frames ------------------------------------------------------------------------------

void Arena::find_cached(const Growth* kept, std::vector<CachedRun>& runs) const {
  const bool clips = kept != nullptr && kept->arena == this;
  for (Block* block : free_) {
    std::byte* low = block->start;
    std::byte* high = block->end();
    if (clips && kept->start < high && low < kept->end()) {
      // What is wanted crosses a border of mapped memory, so one side of it at most is left over.
      if (kept->end() < high) {
        low = kept->end();
      } else {
        high = std::max(low, kept->start);
      }
    }
    const std::size_t first = frames_to(low);
    const std::size_t last = frame_index(high);
    if (first < last) runs.push_back({block, frame_address(first), last - first});
  }
}

Block* Arena::cut(const CachedRun& run, std::size_t frames) {
  Block* block = run.block;
  const std::size_t nbytes = frames * parts_.frame_size;
  std::byte* const start = run.start + run.frames * parts_.frame_size - nbytes;
  free_.erase(block);
  if (start > block->start) {
    Block* upper = split(block, static_cast<std::size_t>(start - block->start));
    free_.insert(block);
    block = upper;
  }
  if (block->nbytes > nbytes) free_.insert(split(block, nbytes));
  block->state = BlockState::kLeaving;
  return block;
}

void Arena::unmap(Block* leaving, std::vector<Frame>& frames) {
  const std::size_t before = mapped_;
  const std::size_t first = frame_index(leaving->start);
  const std::size_t count = leaving->nbytes / parts_.frame_size;
  frames.reserve(frames.size() + count);
  std::size_t done = 0;
  try {
    for (; done < count; ++done) {
      parts_.device->unmap(frame_address(first + done), parts_.frame_size);
      frames.push_back(std::exchange(frames_[first + done], Frame()));
      --mapped_;
    }
  } catch (...) {
    if (done > 0) {
      Block* rest = split(leaving, done * parts_.frame_size);
      make_unmapped(leaving);
      leaving = rest;
    }
    make_free(leaving);
    count_frames(before);
    throw;
  }
  make_unmapped(leaving);
  count_frames(before);
}

std::pair<std::size_t, std::size_t> Arena::inactive_split() const {
  std::size_t pieces = 0;
  std::size_t nbytes = 0;
  for (const Block* at = first_; at != nullptr;) {
    std::byte* const start = at->start;
    const std::byte* end = start;
    while (at != nullptr && (at->state == BlockState::kFree || at->state == BlockState::kQuick)) {
      end = at->end();
      at = at->after;
    }
    if (end == start) {
      at = at->after;
      continue;
    }
    const std::size_t first = frames_to(start);
    const std::size_t last = frame_index(end);
    const std::size_t whole = first < last ? (last - first) * parts_.frame_size : 0;
    const auto total = static_cast<std::size_t>(end - start);
    if (total > whole) ++pieces;
    nbytes += total - whole;
  }
  return {pieces, nbytes};
}

}  // namespace penstock
