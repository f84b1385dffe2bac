// The allocator gives out device memory for whatever is not weights, out of frames that are charged
// to the cap like all others, and keeps what is freed for the next request.
//
// Stream order: a block belongs to the stream that it was asked for on. Once freed it may be handed
// out again at once on that stream, because work given to the stream later runs later. Where other
// streams use it too, they are recorded, and it is held back after `free` until the work that they
// had been given by then is over.
//
// Where memory comes from, in this order: a block of the very size that was just freed; the best
// fit among what is mapped for the stream; new frames, while the cap allows; frames that this
// allocator holds for other streams or at other addresses and that nobody uses, after their
// stream's work is over; blocks that are held back, after a wait; frames of others (RoomSource).
// Then, where the user allows it, a large request is served from the host's memory (Overflow). Only
// then is a request refused, and nothing has changed but that caches are smaller.
//
// Private pools: while one is begun, requests on the streams that its filter names are served from
// arenas of its own, because a graph that is captured there uses their addresses whenever it is
// replayed. Nothing of a pool goes elsewhere until it is released as often as it was begun or held
// and all its blocks are free. So blocks of a pool in use can be put back to where they were: a
// graph's replay leaves its results at addresses which the allocator takes for free.
//
// Locks: one mutex, held for bookkeeping, for mapping, and for recording events; never while
// waiting for the device and never while asking others for room. As with all sources of room, who
// calls `allocate` holds no lock that a source takes. Streams outlive the blocks and the cached
// frames that were taken on them. Thread-safe.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "allocator/arena.hpp"
#include "allocator/heap.hpp"
#include "allocator/hold_back.hpp"
#include "allocator/live_block.hpp"
#include "allocator/overflow.hpp"
#include "allocator/pressure_log.hpp"
#include "allocator/pressure_turn.hpp"
#include "error/error.hpp"
#include "frame_pool/frame_pool.hpp"

namespace penstock {

struct AllocatorOptions {
  /// Addresses reserved at a time, by side; 0: as suits the device. More where a block needs more.
  std::size_t small_arena_bytes = 0;
  std::size_t large_arena_bytes = 0;
};

class CachingAllocator : public RoomSource {
 public:
  /// Tells a pool which streams are its own. Called under the allocator's lock: it must not call
  /// the allocator.
  using StreamFilter = std::function<bool(StreamHandle)>;

  /// Frames come from `pool`, charged to activations; the allocator is a source of room there.
  /// @throws std::invalid_argument where an arena is not a multiple of the size of frames.
  static std::shared_ptr<CachingAllocator> create(std::shared_ptr<FramePool> pool,
                                                  AllocatorOptions options = {});
  /// Waits for the device; blocks that are live are gone then.
  ~CachingAllocator() override;
  CachingAllocator(const CachingAllocator&) = delete;
  CachingAllocator& operator=(const CachingAllocator&) = delete;

  /// Memory for work of `stream`, aligned to 512 bytes; null for no bytes.
  /// @throws CapExceededError where there is no room for it under the cap, DeviceError.
  void* allocate(std::size_t nbytes, StreamHandle stream);
  /// Takes a block back. Null is nothing. @throws std::invalid_argument for any other address that
  /// is not that of a live block.
  void free(void* address);
  /// From now on work of `stream` uses the block too. @throws std::invalid_argument as `free` does.
  void record_stream(void* address, StreamHandle stream);

  /// Gives back all frames on which no block lies. @return bytes given back.
  std::size_t empty_cache();
  std::size_t give_back(std::size_t nbytes) override;

  /// Serves requests on the streams that `filter` names from pool `id`. What captures in it may
  /// begin as soon as this returns: nobody waits for the whole device then, or will.
  /// @throws std::invalid_argument where it is begun already.
  void begin_pool(PoolId id, StreamFilter filter);
  /// Requests are served from the common pool again. @throws std::invalid_argument if not begun.
  void end_pool(PoolId id);
  /// One user more, without serving requests from it. Makes the pool where there is none.
  void hold_pool(PoolId id);
  /// One user fewer than `begin_pool` and `hold_pool` have made. @throws std::invalid_argument if
  /// there is none.
  void release_pool(PoolId id);
  /// Users of a pool; 0 where there is none.
  std::size_t pool_uses(PoolId id) const;
  /// Has exactly the blocks `wanted` live in a pool: frees the others, waiting for streams that use
  /// them, and takes back those that were freed. For while nobody else uses the pool.
  /// @param wanted  What `live_blocks` told of the pool at some time.
  /// @throws std::invalid_argument where one of them does not lie in free memory of the pool; then
  /// the others are freed, and none is taken back.
  void restore_pool(PoolId id, const std::vector<LiveBlock>& wanted);

  /// Bytes of frames beyond what blocks have taken at any time since the last call.
  std::size_t take_idle_bytes();

  /// The most bytes that blocks have taken since `reset_peak_stats`.
  std::size_t peak_active_bytes() const;

  AllocatorStats stats();
  void reset_peak_stats();
  void reset_accumulated_stats();
  /// All live blocks, the oldest first.
  std::vector<LiveBlock> live_blocks() const;
  /// The live block that starts at an address, if any.
  std::optional<LiveBlock> find_block(const void* address) const;

  /// What large requests get when the cap is full; nothing unless it is given a limit. Blocks come
  /// and go through the allocator.
  Overflow& overflow() noexcept { return overflow_; }
  const std::shared_ptr<FramePool>& pool() const noexcept { return pool_; }
  /// What happened where memory was short; for as long as the allocator lives.
  PressureLog& pressure() noexcept { return pressure_; }

 private:
  using Lock = std::unique_lock<std::mutex>;
  static constexpr std::size_t kLeastOverflow = std::size_t{1} << 20;
  struct Begun {
    BlockPool* pool;
    StreamFilter filter;
  };

  CachingAllocator(std::shared_ptr<FramePool> pool, std::array<std::size_t, 2> arena_bytes);

  // All with mutex_ held but for allocate_slowly; who is given the lock lets go of it while
  // waiting.
  void* allocate_slowly(std::size_t requested, std::size_t nbytes, StreamHandle stream);
  BlockPool& pool_of(StreamHandle stream);
  BlockPool* private_pool(PoolId id);
  Heap& heap_of(StreamHandle stream);
  void* hand_out(Block* block, std::size_t requested);
  Block* live_block(const void* address) const;
  [[noreturn]] static void refuse_unknown(void* address, const char* what);
  void recycle(Block* block);
  void release(Block* block);
  void retire();
  bool take_frames(std::size_t count, std::vector<Frame>& frames);
  CapExceededError refusal(std::size_t requested) const;
  std::vector<LiveBlock> largest_blocks(std::size_t count) const;
  static LiveBlock describe(const Block& block);
  /// Hands a block out where there are frames for it; those beyond are given back.
  void* grow(const Growth& growth, std::vector<Frame>& frames, std::size_t requested);
  bool may_overflow(std::size_t requested, StreamHandle stream);
  /// Frames that a request which may overflow leaves free, for those which may not.
  std::size_t spare_frames(std::size_t requested, StreamHandle stream);
  void* take_overflow(Lock& lock, std::size_t requested, StreamHandle stream);
  bool free_overflow(void* address);
  template <typename Visit>
  void for_each_pool(Visit visit) {
    visit(common_);
    for (const auto& [id, pool] : private_) visit(*pool);
  }

  // Making room.
  std::size_t reclaim(Lock& lock, std::size_t count, const Growth* kept,
                      std::vector<Frame>& frames);
  std::vector<CachedRun> find_cached(const Growth* kept);
  void wait_until_unused(Lock& lock, const std::vector<Block*>& leaving);
  void synchronize_device();  // without the lock
  bool wait_for_held(Lock& lock);
  bool make_room(std::size_t requested, std::size_t count);  // without the lock
  void drop_empty_pools();
  std::size_t give_frames(std::size_t count);

  std::shared_ptr<FramePool> pool_;
  std::shared_ptr<Device> device_;
  std::array<std::size_t, 2> arena_bytes_;
  PressureTurn turn_;
  PressureLog pressure_;
  EventPool events_;
  Overflow overflow_;  // its lock is taken under mutex_, never the other way round

  mutable std::mutex mutex_;
  ArenaParts parts_;
  BlockPool common_;
  std::map<PoolId, std::unique_ptr<BlockPool>> private_;
  std::vector<Begun> begun_;
  std::size_t device_waits_ = 0;  // for the whole device, without the lock
  std::condition_variable device_waits_over_;
  Heap* latest_ = nullptr;  // of the common pool
  HoldBack held_;
  std::vector<Block*> retired_;  // kept for its memory
  std::unordered_map<const Block*, std::vector<StreamHandle>> recorded_;
  std::uint64_t sequence_ = 0;
  std::int64_t most_active_ = 0;  // bytes of frames, since take_idle_bytes
  std::int64_t overflowed_ = 0;   // bytes in live blocks beside frames
};

}  // namespace penstock
