// What the allocator has beside its frames: blocks that overflow to the host. They are in torch's
// figures as others are, and in none of those that say what frames are needed for.
#include <algorithm>

#include "allocator/caching_allocator.hpp"

namespace penstock {

namespace {

// What large requests leave to small ones, and at most which part of the cap.
constexpr std::size_t kSmallRoom = std::size_t{8} << 20;
constexpr std::size_t kSmallPart = 64;

}  // namespace

bool CachingAllocator::may_overflow(std::size_t requested, StreamHandle stream) {
  // A graph would go on using the address after the block is freed, which only its pool knows of.
  const bool is_private = !begun_.empty() && pool_of(stream).is_private;
  return !is_private && requested >= kLeastOverflow && overflow_.stats().limit > 0;
}

std::size_t CachingAllocator::spare_frames(std::size_t requested, StreamHandle stream) {
  if (!may_overflow(requested, stream)) return 0;
  const std::size_t frame = pool_->frame_size();
  return std::min(std::max(kSmallRoom, frame), pool_->budget().cap() / kSmallPart) / frame;
}

void* CachingAllocator::take_overflow(Lock& lock, std::size_t requested, StreamHandle stream) {
  if (!may_overflow(requested, stream)) return nullptr;
  const std::uint64_t sequence = ++sequence_;
  lock.unlock();
  const std::optional<LiveBlock> block = overflow_.take(requested, stream, sequence);
  lock.lock();
  if (!block) return nullptr;
  const std::size_t nbytes = block->nbytes;
  overflowed_ += static_cast<std::int64_t>(nbytes);
  parts_.stats.apply(Side::kLarge, [&](SideStats& figures) {
    figures.allocation.increase(1);
    figures.segment.increase(1);
    figures.active.increase(1);
    figures.allocated_bytes.increase(nbytes);
    figures.reserved_bytes.increase(nbytes);
    figures.active_bytes.increase(nbytes);
    figures.requested_bytes.increase(requested);
  });
  return block->address;
}

bool CachingAllocator::free_overflow(void* address) {
  const std::optional<LiveBlock> block = overflow_.give(address);
  if (!block) return false;
  overflowed_ -= static_cast<std::int64_t>(block->nbytes);
  parts_.stats.apply(Side::kLarge, [&](SideStats& figures) {
    figures.allocation.decrease(1);
    figures.segment.decrease(1);
    figures.active.decrease(1);
    figures.allocated_bytes.decrease(block->nbytes);
    figures.reserved_bytes.decrease(block->nbytes);
    figures.active_bytes.decrease(block->nbytes);
    figures.requested_bytes.decrease(block->requested);
  });
  return true;
}

}  // namespace penstock
