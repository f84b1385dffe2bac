#include "allocator/caching_allocator.hpp"

#include <algorithm>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>

#include "error/format.hpp"

namespace penstock {

namespace {

constexpr int kRounds = 64;          // of making room for one request, while others take it
constexpr std::size_t kLargest = 5;  // blocks that a refusal names

std::size_t rounded_up(std::size_t nbytes, std::size_t multiple) {
  const std::size_t up = nbytes + (multiple - 1);
  return up < nbytes ? std::numeric_limits<std::size_t>::max() : up / multiple * multiple;
}

}  // namespace

std::shared_ptr<CachingAllocator> CachingAllocator::create(std::shared_ptr<FramePool> pool,
                                                           AllocatorOptions options) {
  const std::size_t frame = pool->frame_size();
  const std::size_t total = pool->device()->info().total_bytes;
  std::array<std::size_t, 2> arena_bytes = {options.small_arena_bytes, options.large_arena_bytes};
  // All of the memory and somewhat more, so that addresses do not run out before the memory does.
  if (arena_bytes[0] == 0) arena_bytes[0] = rounded_up(total / 8, frame);
  if (arena_bytes[1] == 0) arena_bytes[1] = rounded_up(total + total / 8, frame);
  for (const std::size_t nbytes : arena_bytes) {
    if (nbytes % frame == 0) continue;
    throw std::invalid_argument("an arena of " + format_bytes(nbytes) +
                                " is not a multiple of frames of " + format_bytes(frame));
  }
  FramePool& source = *pool;
  const std::shared_ptr<CachingAllocator> allocator(
      new CachingAllocator(std::move(pool), arena_bytes));
  source.add_source(allocator, RoomRank::kCachedFrames);
  return allocator;
}

CachingAllocator::CachingAllocator(std::shared_ptr<FramePool> pool,
                                   std::array<std::size_t, 2> arena_bytes)
    : pool_(std::move(pool)),
      device_(pool_->device()),
      arena_bytes_(arena_bytes),
      events_(device_, Timing::kOff),
      overflow_(device_),
      held_(device_) {
  parts_.device = device_;
  parts_.frame_size = pool_->frame_size();
}

CachingAllocator::~CachingAllocator() {
  try {
    device_->synchronize();
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
}

// ---- where a request goes ----------------------------------------------------------------------

BlockPool& CachingAllocator::pool_of(StreamHandle stream) {
  for (const Begun& begun : begun_) {
    if (begun.filter(stream)) return *begun.pool;
  }
  return common_;
}

Heap& CachingAllocator::heap_of(StreamHandle stream) {
  BlockPool& pool = begun_.empty() ? common_ : pool_of(stream);
  const bool common = &pool == &common_;
  if (common && latest_ != nullptr && latest_->stream().value == stream.value) return *latest_;
  auto& heap = pool.heaps[stream.value];
  if (!heap) heap = std::make_unique<Heap>(parts_, pool, stream, arena_bytes_);
  if (common) latest_ = heap.get();
  return *heap;
}

void* CachingAllocator::hand_out(Block* block, std::size_t requested) {
  block->state = BlockState::kLive;
  block->requested = requested;
  block->sequence = ++sequence_;
  ++block->arena->pool().live;
  parts_.stats.apply(block->arena->side(), [&](SideStats& figures) {
    figures.allocation.increase(1);
    figures.active.increase(1);
    figures.allocated_bytes.increase(block->nbytes);
    figures.active_bytes.increase(block->nbytes);
    figures.requested_bytes.increase(requested);
  });
  most_active_ =
      std::max(most_active_, parts_.stats.side(Side::kAll).active_bytes.current - overflowed_);
  return block->start;
}

void* CachingAllocator::allocate(std::size_t nbytes, StreamHandle stream) {
  if (nbytes == 0) return nullptr;
  const std::size_t rounded = rounded_up(nbytes, kBlockAlignment);
  {
    const std::lock_guard lock(mutex_);
    if (Block* block = heap_of(stream).take_quick(rounded)) return hand_out(block, nbytes);
  }
  return allocate_slowly(nbytes, rounded, stream);
}

bool CachingAllocator::take_frames(std::size_t count, std::vector<Frame>& frames) {
  frames.reserve(count);
  while (frames.size() < count) {
    std::optional<Frame> frame = pool_->try_take(Tag::kActivations);
    if (!frame) return false;
    frames.push_back(std::move(*frame));
  }
  return true;
}

void* CachingAllocator::grow(const Growth& growth, std::vector<Frame>& frames,
                             std::size_t requested) {
  frames.erase(frames.begin() + static_cast<std::ptrdiff_t>(growth.frames), frames.end());
  if (pressure_.listening()) pressure_.note_use(requested, pool_->budget().stats());
  return hand_out(growth.arena->grow(growth, frames), requested);
}

void* CachingAllocator::allocate_slowly(std::size_t requested, std::size_t nbytes,
                                        StreamHandle stream) {
  const RelaxedCapture relaxed(*device_);
  PressureTurn::Hold turn(turn_);
  std::vector<Frame> frames;  // for this request, not mapped yet; what is left is given back
  Lock lock(mutex_);
  bool last = false;
  const std::size_t spare = spare_frames(requested, stream);
  for (int round = 0; round < kRounds; ++round) {
    retire();
    Heap& heap = heap_of(stream);
    Block* block = heap.take_quick(nbytes);
    if (block == nullptr) block = heap.take_best(nbytes);
    if (block != nullptr) return hand_out(block, requested);
    if (nbytes > pool_->budget().cap()) break;
    const Growth growth = heap.plan(nbytes);
    if (take_frames(growth.frames + spare, frames)) return grow(growth, frames, requested);
    if (last) break;
    if (!turn.taken()) {
      ++parts_.stats.num_alloc_retries;
      lock.unlock();
      turn.take();
      lock.lock();
      continue;
    }
    const std::size_t missing = growth.frames + spare - frames.size();
    if (reclaim(lock, missing, &growth, frames) > 0 || wait_for_held(lock)) continue;
    lock.unlock();
    last = !make_room(requested, missing);
    lock.lock();
  }
  frames.clear();  // so that the numbers are without them
  if (void* address = take_overflow(lock, requested, stream)) return address;
  if (spare > 0) {
    const Growth growth = heap_of(stream).plan(nbytes);
    if (take_frames(growth.frames, frames)) return grow(growth, frames, requested);
    frames.clear();
  }
  ++parts_.stats.num_ooms;
  if (pressure_.listening()) pressure_.note_refusal(requested, pool_->budget().stats());
  throw refusal(requested);
}

// ---- freeing -----------------------------------------------------------------------------------

Block* CachingAllocator::live_block(const void* address) const {
  Block* block = parts_.blocks.find(address);
  return block != nullptr && block->state == BlockState::kLive ? block : nullptr;
}

void CachingAllocator::refuse_unknown(void* address, const char* what) {
  throw std::invalid_argument(std::string(what) + ": " + format_address(address) +
                              " is not the address of a live block");
}

void CachingAllocator::recycle(Block* block) {
  Arena& arena = *block->arena;
  parts_.stats.apply(arena.side(), [&](SideStats& figures) {
    figures.active.decrease(1);
    figures.active_bytes.decrease(block->nbytes);
    figures.requested_bytes.decrease(block->requested);
  });
  --arena.pool().live;
  arena.give(block, ++sequence_);
}

void CachingAllocator::free(void* address) {
  if (address == nullptr) return;
  const std::lock_guard lock(mutex_);
  Block* block = live_block(address);
  if (block == nullptr) {
    if (!free_overflow(address)) refuse_unknown(address, "free");
    return;
  }
  release(block);
}

void CachingAllocator::release(Block* block) {
  parts_.stats.apply(block->arena->side(), [&](SideStats& figures) {
    figures.allocation.decrease(1);
    figures.allocated_bytes.decrease(block->nbytes);
  });
  if (!block->recorded) {
    recycle(block);
    return;
  }
  const auto streams = recorded_.extract(block);
  block->recorded = false;
  block->state = BlockState::kHeld;
  held_.hold(block, streams.mapped());
}

void CachingAllocator::record_stream(void* address, StreamHandle stream) {
  if (address == nullptr) return;
  const std::lock_guard lock(mutex_);
  Block* block = live_block(address);
  if (block == nullptr) {
    if (!overflow_.record_stream(address, stream)) refuse_unknown(address, "record_stream");
    return;
  }
  if (block->arena->stream().value == stream.value) return;
  auto& streams = recorded_[block];
  block->recorded = true;
  const auto same = [&](StreamHandle other) { return other.value == stream.value; };
  if (std::none_of(streams.begin(), streams.end(), same)) streams.push_back(stream);
}

void CachingAllocator::retire() {
  if (held_.empty()) return;
  retired_.clear();
  held_.retire(retired_);
  for (Block* block : retired_) recycle(block);
}

// ---- what is there -----------------------------------------------------------------------------

LiveBlock CachingAllocator::describe(const Block& block) {
  return {block.start,           block.nbytes,   block.requested,
          block.arena->stream(), block.sequence, block.arena->pool().id};
}

std::vector<LiveBlock> CachingAllocator::live_blocks() const {
  std::vector<LiveBlock> live;
  {
    const std::lock_guard lock(mutex_);
    parts_.blocks.for_each([&](const Block& block) {
      if (block.state == BlockState::kLive) live.push_back(describe(block));
    });
    overflow_.add_live(live);
  }
  std::sort(live.begin(), live.end(),
            [](const LiveBlock& a, const LiveBlock& b) { return a.sequence < b.sequence; });
  return live;
}

std::optional<LiveBlock> CachingAllocator::find_block(const void* address) const {
  const std::lock_guard lock(mutex_);
  if (const Block* block = live_block(address)) return describe(*block);
  return overflow_.find(address);
}

std::vector<LiveBlock> CachingAllocator::largest_blocks(std::size_t count) const {
  std::vector<LiveBlock> live;
  parts_.blocks.for_each([&](const Block& block) {
    if (block.state == BlockState::kLive) live.push_back(describe(block));
  });
  overflow_.add_live(live);
  const auto end = live.begin() + static_cast<std::ptrdiff_t>(std::min(count, live.size()));
  std::partial_sort(live.begin(), end, live.end(), [](const LiveBlock& a, const LiveBlock& b) {
    return a.nbytes != b.nbytes ? a.nbytes > b.nbytes : a.sequence < b.sequence;
  });
  live.erase(end, live.end());
  return live;
}

CapExceededError CachingAllocator::refusal(std::size_t requested) const {
  const BudgetStats ledger = pool_->budget().stats();
  const SideStats& all = parts_.stats.side(Side::kAll);
  std::string text = "Tried to allocate " + format_bytes(requested) + ": the cap is " +
                     format_bytes(ledger.cap) + " and " + format_bytes(ledger.used) + " are in use";
  for (std::size_t i = 0; i < kTagCount; ++i) {
    if (ledger.used_by_tag[i] == 0) continue;
    text += std::string(", ") + tag_name(static_cast<Tag>(i)) + " " +
            format_bytes(ledger.used_by_tag[i]);
  }
  const auto held = static_cast<std::size_t>(all.reserved_bytes.current - overflowed_);
  const auto live = static_cast<std::size_t>(all.allocated_bytes.current - overflowed_);
  const auto active = static_cast<std::size_t>(all.active_bytes.current - overflowed_);
  text += ". Of the activations " + format_bytes(live) + " are in live blocks, " +
          format_bytes(active - live) + " freed but still used by other streams, and " +
          format_bytes(held - active) + " free in pieces or kept for graphs.";
  if (const OverflowStats overflow = overflow_.stats(); overflow.limit > 0) {
    text += " Of the host's memory " + format_bytes(overflow.held) + " of " +
            format_bytes(overflow.limit) + " are taken.";
  }
  const std::vector<LiveBlock> largest = largest_blocks(kLargest);
  for (std::size_t i = 0; i < largest.size(); ++i) {
    text += (i == 0 ? " The largest blocks: " : ", ") + format_bytes(largest[i].nbytes);
  }
  if (!largest.empty()) text += ".";
  text += " Raise the cap, use smaller batches, or free something first.";
  return {text, requested, ledger.cap, ledger.used};
}

std::size_t CachingAllocator::take_idle_bytes() {
  const std::lock_guard lock(mutex_);
  const SideStats& all = parts_.stats.side(Side::kAll);
  const std::int64_t needed = std::exchange(most_active_, all.active_bytes.current - overflowed_);
  const std::int64_t idle = all.reserved_bytes.current - overflowed_ - needed;
  return static_cast<std::size_t>(std::max<std::int64_t>(0, idle));
}

std::size_t CachingAllocator::peak_active_bytes() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(parts_.stats.side(Side::kAll).active_bytes.peak);
}

AllocatorStats CachingAllocator::stats() {
  const std::lock_guard lock(mutex_);
  std::array<std::pair<std::size_t, std::size_t>, kSideCount> split{};
  for_each_pool([&](BlockPool& pool) {
    for (const auto& [stream, heap] : pool.heaps) {
      heap->for_each_arena([&](const Arena& arena) {
        const auto [pieces, nbytes] = arena.inactive_split();
        for (const Side side : {arena.side(), Side::kAll}) {
          split[static_cast<std::size_t>(side)].first += pieces;
          split[static_cast<std::size_t>(side)].second += nbytes;
        }
      });
    }
  });
  for (std::size_t i = 0; i < kSideCount; ++i) {
    parts_.stats.sides[i].inactive_split.settle(split[i].first);
    parts_.stats.sides[i].inactive_split_bytes.settle(split[i].second);
  }
  return parts_.stats;
}

void CachingAllocator::reset_peak_stats() {
  const std::lock_guard lock(mutex_);
  parts_.stats.reset_peak();
}

void CachingAllocator::reset_accumulated_stats() {
  const std::lock_guard lock(mutex_);
  parts_.stats.reset_accumulated();
}

}  // namespace penstock
