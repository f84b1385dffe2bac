// An arena is a range of reserved addresses in which the blocks of one stream lie, small ones or
// large ones, with frames mapped under those parts where blocks are or were. Addresses are
// contiguous and frames are any, so that free memory in many frames is one large block wherever its
// addresses lie together, and can be made so where they do not: a frame on which no block in use
// lies is cached, and can be taken away and mapped under other addresses.
//
// The arena keeps the borders of blocks and what is mapped; it knows nothing of threads (its owner
// holds a lock) or of work under way: who takes a cached frame away first waits for the stream's
// work, during which the frame's addresses are a block that is leaving. All device calls here are
// mappings. If one fails, what was done so far stays done and is consistent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "allocator/allocator_stats.hpp"
#include "allocator/block.hpp"
#include "allocator/block_map.hpp"
#include "allocator/quick_cache.hpp"
#include "device/handles.hpp"
#include "frame_pool/frame_pool.hpp"

namespace penstock {

struct BlockPool;

/// What the arenas of an allocator share; outlives them.
struct ArenaParts {
  std::shared_ptr<Device> device;
  std::size_t frame_size = 0;
  BlockSlab slab;
  BlockMap blocks;  ///< Those that are live, held or quick.
  AllocatorStats stats;
};

/// Where a block could lie if `frames` more frames were mapped.
struct Growth {
  Arena* arena = nullptr;
  std::byte* start = nullptr;
  std::size_t nbytes = 0;
  std::size_t frames = 0;

  std::byte* end() const noexcept { return start + nbytes; }
};

/// Frames that lie together and that nobody uses.
struct CachedRun {
  Block* block = nullptr;  ///< The free block that they are part of.
  std::byte* start = nullptr;
  std::size_t frames = 0;
};

class Arena {
 public:
  /// Reserves `nbytes` of addresses, a multiple of the size of frames.
  Arena(ArenaParts& parts, BlockPool& pool, StreamHandle stream, Side side, std::size_t nbytes);
  /// Unmaps and gives back all frames; nothing on the device uses them any more.
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  BlockPool& pool() const noexcept { return pool_; }
  StreamHandle stream() const noexcept { return stream_; }
  Side side() const noexcept { return side_; }
  std::size_t frame_count() const noexcept { return mapped_; }

  /// A block of exactly `nbytes` that was just freed, or null.
  Block* take_quick(std::size_t nbytes) noexcept { return quick_.take(nbytes); }
  /// The smallest free block that `nbytes` fit in, cut to size, the lowest one of equals; or null.
  Block* take_best(std::size_t nbytes);
  /// The free block that these bytes are part of, or null.
  Block* find_free(const std::byte* start, std::size_t nbytes) const noexcept;
  /// Cuts a block out of it, which there is.
  Block* take_at(std::byte* start, std::size_t nbytes);
  /// Takes a live or held block back.
  void give(Block* block, std::uint64_t sequence);
  /// Joins quick blocks with what is free beside them.
  void flush();

  /// Where `nbytes` need the fewest new frames, the lowest place of equals; none where no addresses
  /// are left.
  std::optional<Growth> plan(std::size_t nbytes) const;
  /// Maps the last of `frames`, as many as planned, and cuts out the block. @throws DeviceError;
  /// then frames that were mapped are cached, and the others are left in `frames`.
  Block* grow(const Growth& growth, std::vector<Frame>& frames);

  /// Adds the cached frames that lie outside of `kept`.
  void find_cached(const Growth* kept, std::vector<CachedRun>& runs) const;
  /// Takes the last `frames` of a run out of use; they stay mapped.
  Block* cut(const CachedRun& run, std::size_t frames);
  /// Puts a leaving block back into use.
  void restore(Block* leaving) { make_free(leaving); }
  /// Unmaps a leaving block and hands its frames over. @throws DeviceError; then those of its
  /// frames that could not be unmapped are back in use.
  void unmap(Block* leaving, std::vector<Frame>& frames);

  /// Free pieces, and their bytes, on frames that are not cached.
  std::pair<std::size_t, std::size_t> inactive_split() const;

 private:
  struct BySize {
    using is_transparent = void;
    bool operator()(const Block* a, const Block* b) const noexcept {
      return a->nbytes != b->nbytes ? a->nbytes < b->nbytes : a->start < b->start;
    }
    bool operator()(const Block* a, std::size_t nbytes) const noexcept {
      return a->nbytes < nbytes;
    }
  };
  struct ByAddress {
    using is_transparent = void;
    bool operator()(const Block* a, const Block* b) const noexcept { return a->start < b->start; }
    bool operator()(const std::byte* at, const Block* b) const noexcept { return at < b->start; }
  };
  using Run = std::vector<const Block*>;

  std::size_t frame_index(const std::byte* at) const noexcept {
    return static_cast<std::size_t>(at - memory_.address()) / parts_.frame_size;
  }
  std::byte* frame_address(std::size_t index) const noexcept {
    return memory_.address() + index * parts_.frame_size;
  }
  std::size_t frames_to(const std::byte* at) const noexcept {  // rounded up
    return frame_index(at + parts_.frame_size - 1);
  }
  Block* split(Block* block, std::size_t nbytes);
  Block* join(Block* lower, Block* upper) noexcept;
  template <typename Known>
  Block* settle_as(BlockState state, Block* block, Known& known);
  Block* make_free(Block* block);
  void make_unmapped(Block* block);
  Block* carve(Block* free, std::byte* start, std::size_t nbytes);
  void settle(Block* quick);
  Block* add_frame(std::byte* at, Frame& frame);
  void plan_in(const Run& run, std::size_t nbytes, std::optional<Growth>& best) const;
  std::size_t missing_frames(const Run& run, const std::byte* start, std::size_t nbytes) const;
  void count_frames(std::size_t before) noexcept;

  ArenaParts& parts_;
  BlockPool& pool_;
  StreamHandle stream_;
  Side side_;
  AddressRange memory_;
  std::vector<Frame> frames_;  // by index, up to the last one that was ever mapped
  std::size_t mapped_ = 0;
  QuickCache quick_;
  std::pmr::unsynchronized_pool_resource nodes_;
  std::pmr::set<Block*, BySize> free_{&nodes_};
  std::pmr::set<Block*, ByAddress> unmapped_{&nodes_};
  Block* first_;
};

}  // namespace penstock
