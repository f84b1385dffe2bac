// A block is a piece of an arena's addresses. Blocks of one arena lie side by side and cover it;
// each is in one state at a time:
//
//     unmapped -> free -> live -> quick -> free -> leaving -> unmapped
//                          live -> held -> quick
//
//  - unmapped: no memory behind it; borders are borders of frames.
//  - free: memory behind all of it, and nobody uses it. Two free neighbours are one block.
//  - live: handed out.
//  - held: freed by its owner, while work of other streams may still use it.
//  - quick: freed, kept as it is for the next request of the same size.
//  - leaving: its frames are being taken away; nobody may be given it.
//
// Headers come from a slab, so that giving out memory asks the host's allocator for none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace penstock {

class Arena;

/// All sizes of blocks are multiples of this, as torch's own allocator has it.
inline constexpr std::size_t kBlockAlignment = 512;
/// Blocks up to this size live apart from larger ones.
inline constexpr std::size_t kLargestSmallBlock = std::size_t{1} << 20;

enum class BlockState : std::uint8_t { kUnmapped, kFree, kLive, kHeld, kQuick, kLeaving };

struct Block {
  std::byte* start = nullptr;
  std::size_t nbytes = 0;
  std::size_t requested = 0;  ///< Of `nbytes`, while it is live or held.
  Arena* arena = nullptr;
  Block* before = nullptr;  ///< Neighbours by address.
  Block* after = nullptr;
  Block* next = nullptr;       ///< In the list that it is in: quick ones of a size, unused headers.
  std::uint64_t sequence = 0;  ///< When it was handed out or, free, last used.
  std::uint32_t waits = 0;     ///< Events that a held block waits for.
  BlockState state = BlockState::kUnmapped;
  bool recorded = false;  ///< Whether other streams use it.

  std::byte* end() const noexcept { return start + nbytes; }
};

/// Makes block headers and takes them back. Not thread-safe.
class BlockSlab {
 public:
  Block* take() {
    if (unused_ == nullptr) grow();
    Block* block = unused_;
    unused_ = block->next;
    *block = Block();
    return block;
  }
  void give(Block* block) noexcept {
    block->next = unused_;
    unused_ = block;
  }

 private:
  static constexpr std::size_t kChunk = 256;

  void grow() {
    chunks_.push_back(std::make_unique<Block[]>(kChunk));
    for (std::size_t i = 0; i < kChunk; ++i) give(&chunks_.back()[i]);
  }

  std::vector<std::unique_ptr<Block[]>> chunks_;
  Block* unused_ = nullptr;
};

}  // namespace penstock
