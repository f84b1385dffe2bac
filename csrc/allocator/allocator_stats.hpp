// What the allocator counts, under the names that torch.cuda.memory_stats has for it. A segment is
// a frame here, or a block that overflowed to the host. Updated under the allocator's lock.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace penstock {

/// One figure over time.
struct Stat {
  std::int64_t current = 0;
  std::int64_t peak = 0;
  std::int64_t allocated = 0;  ///< Sum of all increases.
  std::int64_t freed = 0;      ///< Sum of all decreases.

  void increase(std::size_t amount) noexcept {
    current += static_cast<std::int64_t>(amount);
    allocated += static_cast<std::int64_t>(amount);
    peak = std::max(peak, current);
  }
  void decrease(std::size_t amount) noexcept {
    current -= static_cast<std::int64_t>(amount);
    freed += static_cast<std::int64_t>(amount);
  }
  /// Moves to what was found by looking, for figures that are not followed step by step.
  void settle(std::size_t found) noexcept {
    const auto now = static_cast<std::int64_t>(found);
    if (now >= current) {
      increase(static_cast<std::size_t>(now - current));
    } else {
      decrease(static_cast<std::size_t>(current - now));
    }
  }
};

/// The figures of blocks of one kind. Bytes are those of blocks, unless they are said to be others.
struct SideStats {
  Stat allocation;            ///< Blocks handed out and not freed.
  Stat segment;               ///< Frames, and blocks on the host.
  Stat active;                ///< Blocks handed out, and freed ones that other streams may use.
  Stat inactive_split;        ///< Free pieces of frames that are in use; as of the last look.
  Stat allocated_bytes;       ///< Of what `allocation` counts.
  Stat reserved_bytes;        ///< Of what `segment` counts.
  Stat active_bytes;          ///< Of what `active` counts.
  Stat inactive_split_bytes;  ///< Of what `inactive_split` counts.
  Stat requested_bytes;       ///< As asked for, of what `active` counts.
};

/// Which blocks a figure is about.
enum class Side : std::uint8_t { kSmall, kLarge, kAll };
inline constexpr std::size_t kSideCount = 3;

struct AllocatorStats {
  std::array<SideStats, kSideCount> sides{};
  std::uint64_t num_alloc_retries = 0;  ///< Requests that had to make room first.
  std::uint64_t num_ooms = 0;           ///< Requests that were refused.
  std::uint64_t num_device_alloc = 0;   ///< Frames that were mapped,
  std::uint64_t num_device_free = 0;    ///< and unmapped.

  const SideStats& side(Side which) const { return sides[static_cast<std::size_t>(which)]; }

  /// Changes the figures of one kind, and those of all.
  template <typename Change>
  void apply(Side which, Change change) {
    change(sides[static_cast<std::size_t>(which)]);
    change(sides[static_cast<std::size_t>(Side::kAll)]);
  }

  /// Calls `visit(name, figure)` for the figures of one kind, with torch's names.
  template <typename Figures, typename Visit>
  static void for_each(Figures& figures, Visit visit) {
    visit("allocation", figures.allocation);
    visit("segment", figures.segment);
    visit("active", figures.active);
    visit("inactive_split", figures.inactive_split);
    visit("allocated_bytes", figures.allocated_bytes);
    visit("reserved_bytes", figures.reserved_bytes);
    visit("active_bytes", figures.active_bytes);
    visit("inactive_split_bytes", figures.inactive_split_bytes);
    visit("requested_bytes", figures.requested_bytes);
  }

  void reset_peak() {
    for (SideStats& figures : sides) {
      for_each(figures, [](const char*, Stat& stat) { stat.peak = stat.current; });
    }
  }
  void reset_accumulated() {
    for (SideStats& figures : sides) {
      for_each(figures, [](const char*, Stat& stat) { stat.allocated = stat.freed = 0; });
    }
    num_alloc_retries = num_ooms = num_device_alloc = num_device_free = 0;
  }
};

}  // namespace penstock
