// A heap is the arenas of one stream in one pool: those of small blocks and those of large ones.
// There is one of each unless its addresses run out, which they do only where live blocks lie so
// that no gap is long enough. A pool is the heaps of all streams: the common one, or a private one
// whose addresses a captured graph relies on. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "allocator/arena.hpp"

namespace penstock {

/// The name of a private pool, as torch gives it (MempoolId_t).
struct PoolId {
  std::uint64_t first = 0;
  std::uint64_t second = 0;
  bool operator==(const PoolId& other) const noexcept {
    return first == other.first && second == other.second;
  }
  bool operator<(const PoolId& other) const noexcept {
    return first != other.first ? first < other.first : second < other.second;
  }
};

class Heap {
 public:
  /// @param arena_bytes  Addresses of an arena, by side; more where one block needs more.
  Heap(ArenaParts& parts, BlockPool& pool, StreamHandle stream,
       const std::array<std::size_t, 2>& arena_bytes)
      : parts_(parts), pool_(pool), stream_(stream), arena_bytes_(arena_bytes) {}

  static Side side_of(std::size_t nbytes) noexcept {
    return nbytes <= kLargestSmallBlock ? Side::kSmall : Side::kLarge;
  }

  /// A block that was just freed; null if there is none of this very size.
  Block* take_quick(std::size_t nbytes) noexcept {
    for (const auto& arena : arenas(nbytes)) {
      if (Block* block = arena->take_quick(nbytes)) return block;
    }
    return nullptr;
  }
  /// A block out of memory that is mapped; null if no free piece is large enough.
  Block* take_best(std::size_t nbytes);
  /// Where the block needs the fewest new frames; reserves addresses if it has to.
  Growth plan(std::size_t nbytes);

  StreamHandle stream() const noexcept { return stream_; }
  template <typename Visit>
  void for_each_arena(Visit visit) const {
    for (const auto& side : arenas_) {
      for (const auto& arena : side) visit(*arena);
    }
  }

 private:
  using Arenas = std::vector<std::unique_ptr<Arena>>;
  Arenas& arenas(std::size_t nbytes) noexcept {
    return arenas_[static_cast<std::size_t>(side_of(nbytes))];
  }

  ArenaParts& parts_;
  BlockPool& pool_;
  StreamHandle stream_;
  std::array<std::size_t, 2> arena_bytes_;
  std::array<Arenas, 2> arenas_;
};

struct BlockPool {
  bool is_private = false;
  PoolId id;
  std::size_t uses = 0;                                    ///< Times it was begun and not released.
  std::size_t live = 0;                                    ///< Blocks that are live or held.
  std::unordered_map<void*, std::unique_ptr<Heap>> heaps;  // by stream

  /// Whether frames on which no block lies may go elsewhere.
  bool may_give() const noexcept { return !is_private || (uses == 0 && live == 0); }
  std::size_t frame_count() const {
    std::size_t count = 0;
    for (const auto& [stream, heap] : heaps) {
      heap->for_each_arena([&](const Arena& arena) { count += arena.frame_count(); });
    }
    return count;
  }
};

}  // namespace penstock
