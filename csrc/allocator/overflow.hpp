// Blocks in managed memory that stays on the host, for requests that the cap has no room for. The
// device reaches them over the link, where they are: nothing moves to it, so they are not charged
// to the cap but bounded by a limit of their own. Each block is a range of its own, in whole MiB.
//
// Stream order is that of the allocator: a freed block goes to the next request of its size on its
// own stream at once, to other streams after the work that its streams had been given is over. What
// is freed stays here for such requests, and counts towards the limit, until room is wanted or
// `empty_cache` is called.
//
// Locks: one mutex, never held while waiting for the device, nor while the device makes or takes
// back memory. Streams outlive the blocks that were taken on them. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "allocator/hold_back.hpp"
#include "allocator/live_block.hpp"
#include "device/handles.hpp"

namespace penstock {

/// In bytes.
struct OverflowStats {
  std::size_t limit = 0;
  std::size_t live = 0;  ///< In blocks that somebody has.
  std::size_t peak = 0;  ///< The most that was live.
  std::size_t held = 0;  ///< Of host memory, in live and freed blocks; at most `limit`.
};

class Overflow {
 public:
  /// @param device  One whose managed memory can be used; else every request is refused.
  explicit Overflow(std::shared_ptr<Device> device);
  /// Nothing on the device uses the blocks any more.
  ~Overflow() = default;
  Overflow(const Overflow&) = delete;
  Overflow& operator=(const Overflow&) = delete;

  /// How many bytes of host memory may be held; 0, as at first, for none. Where more is held,
  /// blocks stay and no new ones are made.
  void set_limit(std::size_t nbytes);

  /// A block for work of `stream`; none where the limit has no room, or the device has none (which
  /// is on record with it). Waits for work that uses freed blocks, where that gives room.
  std::optional<LiveBlock> take(std::size_t nbytes, StreamHandle stream, std::uint64_t sequence);
  /// Takes a block back. @return what it was; none where no live block starts at the address.
  std::optional<LiveBlock> give(void* address);
  /// From now on work of `stream` uses the block too. @return false where there is none.
  bool record_stream(void* address, StreamHandle stream);
  /// Gives the memory of freed blocks back, once their work is over. @return bytes given back.
  std::size_t empty_cache();

  std::optional<LiveBlock> find(const void* address) const;
  void add_live(std::vector<LiveBlock>& blocks) const;
  OverflowStats stats() const;

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Piece : Block {
    std::unique_ptr<ManagedRange> memory;
    StreamHandle stream;                ///< That it was taken on.
    std::vector<StreamHandle> streams;  ///< Others that use it.
  };

  LiveBlock hand_out(Piece& piece, std::size_t requested, StreamHandle stream,
                     std::uint64_t sequence);
  Piece* find_free(std::size_t nbytes, StreamHandle stream);
  std::unique_ptr<Piece> make(Lock& lock, std::size_t nbytes);
  std::size_t release_free(Lock& lock);
  bool wait_for_freed(Lock& lock);
  void retire();
  Piece* live(const void* address) const;
  static LiveBlock describe(const Piece& piece);

  std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;
  HoldBack held_back_;
  std::map<const void*, std::unique_ptr<Piece>> pieces_;  // by address
  std::vector<Block*> retired_;                           // kept for its memory
  OverflowStats stats_;
};

}  // namespace penstock
