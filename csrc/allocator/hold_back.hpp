// Blocks that were freed while other streams may still use them. Each waits for events that are
// recorded on those streams when it is freed. Where a stream captures, an event would become part
// of the graph, so it is recorded when the capture is over; the same where recording fails. Events
// of one stream come in order, so a look at the first of each stream tells. Not thread-safe.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "allocator/block.hpp"
#include "device/event_pool.hpp"

namespace penstock {

class HoldBack {
 public:
  explicit HoldBack(std::shared_ptr<Device> device);

  bool empty() const noexcept { return count_ == 0; }
  /// Holds a block until the work given to the streams so far is over.
  void hold(Block* block, const std::vector<StreamHandle>& streams);
  /// Adds the blocks that need not wait any longer. Never throws for the device: what cannot be
  /// told is asked again next time.
  void retire(std::vector<Block*>& done);
  /// The events that blocks wait for, as far as they are recorded.
  std::vector<Event> pending() const;

 private:
  struct Wait {
    Event event;
    Block* block;
  };
  struct Deferred {
    Block* block;
    StreamHandle stream;
  };

  bool try_record(Block* block, StreamHandle stream);
  bool is_done(const Event& event) noexcept;

  std::shared_ptr<Device> device_;
  EventPool events_;
  std::unordered_map<void*, std::deque<Wait>> waits_;  // by stream, oldest first
  std::vector<Deferred> deferred_;
  std::size_t count_ = 0;  // blocks
};

}  // namespace penstock
