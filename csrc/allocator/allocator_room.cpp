// How the allocator finds room: taking cached frames away from where they are, which waits for the
// streams that may still use them.
#include <algorithm>
#include <exception>
#include <limits>

#include "allocator/caching_allocator.hpp"

namespace penstock {

// The runs whose use is the longest ago first.
std::vector<CachedRun> CachingAllocator::find_cached(const Growth* kept) {
  std::vector<CachedRun> runs;
  for_each_pool([&](BlockPool& pool) {
    // A graph may have run on any stream, which takes a wait for the whole device to know, and
    // that is not allowed while something captures.
    if (!pool.may_give() || (pool.is_private && !begun_.empty())) return;
    for (const auto& [stream, heap] : pool.heaps) {
      const std::size_t before = runs.size();
      heap->for_each_arena([&](Arena& arena) {
        arena.flush();
        arena.find_cached(kept, runs);
      });
      if (runs.size() > before && device_->stream_capturing(heap->stream())) runs.resize(before);
    }
  });
  std::sort(runs.begin(), runs.end(), [](const CachedRun& a, const CachedRun& b) {
    return a.block->sequence < b.block->sequence;
  });
  return runs;
}

void CachingAllocator::wait_until_unused(Lock& lock, const std::vector<Block*>& leaving) {
  std::vector<void*> streams;
  bool whole_device = false;
  for (const Block* block : leaving) {
    whole_device = whole_device || block->arena->pool().is_private;
    streams.push_back(block->arena->stream().value);
  }
  std::sort(streams.begin(), streams.end());
  streams.erase(std::unique(streams.begin(), streams.end()), streams.end());
  std::vector<Event> events;
  for (void* stream : streams) {
    if (!whole_device) events.push_back(events_.record({stream}));
  }
  if (whole_device) ++device_waits_;
  lock.unlock();
  std::exception_ptr error;
  try {
    for (const Event& event : events) wait_until_over(*device_, event);
    if (whole_device) synchronize_device();
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  if (whole_device && --device_waits_ == 0) device_waits_over_.notify_all();
  if (error) std::rethrow_exception(error);
}

void CachingAllocator::synchronize_device() {
  try {
    device_->synchronize();
  } catch (const std::exception& error) {
    device_->suppress(error.what());  // of work that failed, it may be: that is told once
    device_->synchronize();
  }
}

std::size_t CachingAllocator::reclaim(Lock& lock, std::size_t count, const Growth* kept,
                                      std::vector<Frame>& frames) {
  const std::size_t had = frames.size();
  std::vector<Block*> leaving;
  const std::vector<CachedRun> runs = find_cached(kept);
  leaving.reserve(runs.size());
  for (const CachedRun& run : runs) {
    if (count == 0) break;
    const std::size_t taken = std::min(count, run.frames);
    leaving.push_back(run.block->arena->cut(run, taken));
    count -= taken;
  }
  if (leaving.empty()) return 0;
  std::size_t settled = 0;  // of `leaving`, by a call of unmap that also cleans up after itself
  try {
    wait_until_unused(lock, leaving);
    while (settled < leaving.size()) {
      Block* block = leaving[settled++];
      block->arena->unmap(block, frames);
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    for (; settled < leaving.size(); ++settled) leaving[settled]->arena->restore(leaving[settled]);
    throw;
  }
  drop_empty_pools();
  return frames.size() - had;
}

bool CachingAllocator::make_room(std::size_t requested, std::size_t count) {
  const std::size_t before = pool_->budget().available();
  const bool made = pool_->make_room(count * parts_.frame_size, this);
  const BudgetStats ledger = pool_->budget().stats();
  const std::size_t after = ledger.cap - ledger.used;
  if (after > before) pressure_.note_room(requested, ledger, after - before);
  return made;
}

bool CachingAllocator::wait_for_held(Lock& lock) {
  const std::vector<Event> events = held_.pending();
  if (events.empty()) return false;
  lock.unlock();
  for (const Event& event : events) wait_until_over(*device_, event);
  lock.lock();
  return true;
}

std::size_t CachingAllocator::give_frames(std::size_t count) {
  const RelaxedCapture relaxed(*device_);
  std::vector<Frame> frames;
  Lock lock(mutex_);
  retire();
  reclaim(lock, count, nullptr, frames);
  if (frames.size() < count && wait_for_held(lock)) {
    retire();
    reclaim(lock, count - frames.size(), nullptr, frames);
  }
  lock.unlock();
  return frames.size() * parts_.frame_size;
}

std::size_t CachingAllocator::give_back(std::size_t nbytes) {
  const std::size_t frame = parts_.frame_size;
  return give_frames(nbytes / frame + (nbytes % frame == 0 ? 0 : 1));
}

std::size_t CachingAllocator::empty_cache() {
  overflow_.empty_cache();
  return give_frames(std::numeric_limits<std::size_t>::max());
}

}  // namespace penstock
