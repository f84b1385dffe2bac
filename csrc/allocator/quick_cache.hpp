// Blocks that were just freed, by exact size, last in first out: models ask for the same sizes over
// and over, and this answers without looking for room, splitting or joining. Sizes share a fixed
// number of slots; a size that comes to a slot pushes the other one out. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "allocator/block.hpp"

namespace penstock {

class QuickCache {
 public:
  /// A block of exactly `nbytes`, or null.
  Block* take(std::size_t nbytes) noexcept {
    Slot& slot = slot_of(nbytes);
    if (slot.nbytes != nbytes || slot.first == nullptr) return nullptr;
    Block* block = slot.first;
    slot.first = block->next;
    --count_;
    return block;
  }

  /// Keeps a block. @return blocks of another size, linked by `next`, that have to go.
  [[nodiscard]] Block* put(Block* block) noexcept {
    Slot& slot = slot_of(block->nbytes);
    Block* pushed_out = nullptr;
    if (slot.nbytes != block->nbytes) {
      pushed_out = std::exchange(slot.first, nullptr);
      for (const Block* at = pushed_out; at != nullptr; at = at->next) --count_;
      slot.nbytes = block->nbytes;
    }
    block->next = slot.first;
    slot.first = block;
    ++count_;
    return pushed_out;
  }

  /// Hands every block to `visit` and keeps none.
  template <typename Visit>
  void drain(Visit visit) {
    for (std::size_t i = 0; i < kSlots && count_ > 0; ++i) {
      while (Block* block = slots_[i].first) {
        slots_[i].first = block->next;
        --count_;
        visit(block);
      }
    }
  }

  bool empty() const noexcept { return count_ == 0; }

 private:
  static constexpr std::size_t kSlots = 256;
  struct Slot {
    std::size_t nbytes = 0;
    Block* first = nullptr;
  };

  Slot& slot_of(std::size_t nbytes) noexcept {
    const std::uint64_t key = nbytes / kBlockAlignment;
    return slots_[(key * 0x9E3779B97F4A7C15U) >> 56];
  }

  std::array<Slot, kSlots> slots_{};
  std::size_t count_ = 0;
};

}  // namespace penstock
