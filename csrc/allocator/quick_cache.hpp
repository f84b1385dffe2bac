// Blocks that were just freed, by exact size, last in first out: models ask for the same sizes over
// and over, and this answers without looking for room, splitting or joining. A size is kept from
// the second time on that it comes, so that sizes that come once do not break up what is free.
// Sizes share a fixed number of slots; one that is asked for is not pushed out by one that comes
// once in a while. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

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
    slot.credit = kMostCredit;
    --count_;
    return block;
  }

  /// Keeps a block, or not. @return blocks, linked by `next`, that are not kept: this one, and
  /// those of a size whose slot it takes.
  [[nodiscard]] Block* put(Block* block) noexcept {
    Slot& slot = slot_of(block->nbytes);
    if (slot.nbytes == block->nbytes) {
      block->next = slot.first;
      slot.first = block;
      ++count_;
      return nullptr;
    }
    block->next = nullptr;
    if (slot.first != nullptr && slot.credit > 0) {
      --slot.credit;
      return block;
    }
    block->next = slot.first;
    for (const Block* at = slot.first; at != nullptr; at = at->next) --count_;
    slot = {block->nbytes, nullptr, 0};
    return block;
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
  static constexpr std::uint32_t kMostCredit = 8;
  struct Slot {
    std::size_t nbytes = 0;
    Block* first = nullptr;
    std::uint32_t credit = 0;  ///< How often other sizes may come before they take the slot.
  };

  Slot& slot_of(std::size_t nbytes) noexcept {
    const std::uint64_t key = nbytes / kBlockAlignment;
    return slots_[(key * 0x9E3779B97F4A7C15U) >> 56];
  }

  std::array<Slot, kSlots> slots_{};
  std::size_t count_ = 0;
};

}  // namespace penstock
