// Private pools of the allocator: whom requests of a stream go to, who uses a pool, and putting its
// blocks back to where they were.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "allocator/caching_allocator.hpp"
#include "error/format.hpp"

namespace penstock {

namespace {

std::string name_of(PoolId id) {
  return "pool (" + std::to_string(id.first) + ", " + std::to_string(id.second) + ")";
}

}  // namespace

void CachingAllocator::begin_pool(PoolId id, StreamFilter filter) {
  Lock lock(mutex_);
  device_waits_over_.wait(lock, [&] { return device_waits_ == 0; });
  for (const Begun& begun : begun_) {
    if (begun.pool->id == id) throw std::invalid_argument(name_of(id) + " is begun already");
  }
  BlockPool* pool = private_pool(id);
  begun_.push_back({pool, std::move(filter)});
  ++pool->uses;
}

BlockPool* CachingAllocator::private_pool(PoolId id) {
  auto& pool = private_[id];
  if (!pool) {
    pool = std::make_unique<BlockPool>();
    pool->is_private = true;
    pool->id = id;
  }
  return pool.get();
}

void CachingAllocator::hold_pool(PoolId id) {
  const std::lock_guard lock(mutex_);
  ++private_pool(id)->uses;
}

std::size_t CachingAllocator::pool_uses(PoolId id) const {
  const std::lock_guard lock(mutex_);
  const auto found = private_.find(id);
  return found == private_.end() ? 0 : found->second->uses;
}

void CachingAllocator::end_pool(PoolId id) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(begun_.begin(), begun_.end(),
                                  [&](const Begun& begun) { return begun.pool->id == id; });
  if (found == begun_.end()) throw std::invalid_argument(name_of(id) + " is not begun");
  begun_.erase(found);
}

void CachingAllocator::release_pool(PoolId id) {
  const std::lock_guard lock(mutex_);
  const auto found = private_.find(id);
  if (found == private_.end() || found->second->uses == 0) {
    throw std::invalid_argument(name_of(id) + " has no users");
  }
  --found->second->uses;
  drop_empty_pools();
}

void CachingAllocator::drop_empty_pools() {
  for (auto at = private_.begin(); at != private_.end();) {
    const BlockPool& pool = *at->second;
    const bool begun = std::any_of(begun_.begin(), begun_.end(),
                                   [&](const Begun& other) { return other.pool == &pool; });
    const bool empty = !begun && pool.may_give() && pool.frame_count() == 0;
    at = empty ? private_.erase(at) : std::next(at);
  }
}

void CachingAllocator::restore_pool(PoolId id, const std::vector<LiveBlock>& wanted) {
  Lock lock(mutex_);
  BlockPool& pool = *private_pool(id);
  std::unordered_map<std::byte*, const LiveBlock*> missing;
  for (const LiveBlock& block : wanted) {
    missing.emplace(static_cast<std::byte*>(block.address), &block);
  }
  const auto blocks_of = [&](BlockState state) {
    std::vector<Block*> blocks;
    parts_.blocks.for_each([&](Block& block) {
      if (block.state == state && &block.arena->pool() == &pool) blocks.push_back(&block);
    });
    return blocks;
  };
  for (Block* block : blocks_of(BlockState::kLive)) {
    const auto found = missing.find(block->start);
    if (found == missing.end() || found->second->nbytes != block->nbytes) {
      release(block);
    } else {
      missing.erase(found);
    }
  }
  for (retire(); !blocks_of(BlockState::kHeld).empty() && wait_for_held(lock);) retire();
  std::vector<Arena*> places;
  for (const auto& [at, block] : missing) {
    Arena* place = nullptr;
    if (const auto heap = pool.heaps.find(block->stream.value); heap != pool.heaps.end()) {
      heap->second->for_each_arena([&](Arena& arena) {
        arena.flush();
        if (arena.find_free(at, block->nbytes) != nullptr) place = &arena;
      });
    }
    if (place == nullptr) {
      throw std::invalid_argument(name_of(id) + ": " + format_bytes(block->nbytes) + " at " +
                                  format_address(at) + " are not free memory of it");
    }
    places.push_back(place);
  }
  auto place = places.begin();
  for (const auto& [at, block] : missing) {
    hand_out((*place++)->take_at(at, block->nbytes), block->requested);
  }
}

}  // namespace penstock
