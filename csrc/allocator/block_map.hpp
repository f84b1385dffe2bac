// From an address to the block that was handed out there. Open addressing with linear probes in one
// array that is at most half full: finding takes one cache line most of the time. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "allocator/block.hpp"

namespace penstock {

class BlockMap {
 public:
  BlockMap() : slots_(kFirstSize, nullptr) {}

  /// The block that starts at `address`, or null.
  Block* find(const void* address) const noexcept {
    for (std::size_t i = home(address);; i = next(i)) {
      Block* block = slots_[i];
      if (block == nullptr || block->start == address) return block;
    }
  }

  /// Adds a block whose start is not in the map.
  void insert(Block* block) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    place(block);
    ++count_;
  }

  /// Takes out a block that is in the map.
  void erase(const Block* block) noexcept {
    std::size_t hole = home(block->start);
    while (slots_[hole] != block) hole = next(hole);
    // Moves back what was pushed past the hole, so that no search ends there too early.
    for (std::size_t i = next(hole); slots_[i] != nullptr; i = next(i)) {
      const std::size_t wanted = home(slots_[i]->start);
      if (((i - wanted) & mask()) < ((i - hole) & mask())) continue;
      slots_[hole] = slots_[i];
      hole = i;
    }
    slots_[hole] = nullptr;
    --count_;
  }

  template <typename Visit>
  void for_each(Visit visit) const {
    for (Block* block : slots_) {
      if (block != nullptr) visit(*block);
    }
  }

 private:
  static constexpr std::size_t kFirstSize = 1024;

  std::size_t mask() const noexcept { return slots_.size() - 1; }
  std::size_t next(std::size_t i) const noexcept { return (i + 1) & mask(); }
  std::size_t home(const void* address) const noexcept {
    const auto key = reinterpret_cast<std::uintptr_t>(address) / kBlockAlignment;
    return static_cast<std::size_t>((key * 0x9E3779B97F4A7C15U) >> 20) & mask();
  }
  void place(Block* block) noexcept {
    std::size_t i = home(block->start);
    while (slots_[i] != nullptr) i = next(i);
    slots_[i] = block;
  }
  void grow() {
    std::vector<Block*> old(2 * slots_.size(), nullptr);
    old.swap(slots_);
    for (Block* block : old) {
      if (block != nullptr) place(block);
    }
  }

  std::vector<Block*> slots_;
  std::size_t count_ = 0;
};

}  // namespace penstock
