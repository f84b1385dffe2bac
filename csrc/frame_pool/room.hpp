// Room under the cap is made by those who hold frames that they can do without. Each of them is a
// RoomSource; the RoomMaker asks them in the order of what giving costs, until enough is free. It
// holds them weakly: who is about to go is not asked.
//
// Lock rule: nobody holds a lock that a source takes while asking for room. A source takes its own
// locks while it gives, so an asker that held one could meet, from the other side, a source that
// asks.
// The maker keeps the rule itself: its list is locked for copying only. A source may ask for room
// while it gives; whoever is giving on the same thread is not asked again, so that this ends.
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "budget/budget.hpp"
#include "device/device.hpp"

namespace penstock {

/// Who is asked first: those from whom taking costs least.
enum class RoomRank : std::uint8_t {
  kRetired,       ///< Frames of who is in nobody's charge any more.
  kCachedFrames,  ///< Frames that nobody uses.
  kResidentSet,   ///< Pages that would have to be loaded in every pass.
  kRing,          ///< Frames that pages stream through: fewer of them stall the stream.
  kOverflow,      ///< Whatever is left.
  kLargestStep,   ///< What a model in use needs for its next operation, for one under way.
};

class RoomSource {
 public:
  virtual ~RoomSource() = default;

  /// Gives back at least `nbytes` of what was charged to the budget, if it can; waits for the
  /// device where it must. @return what it gave, in bytes.
  virtual std::size_t give_back(std::size_t nbytes) = 0;
};

class RoomMaker {
 public:
  void add_source(std::weak_ptr<RoomSource> source, RoomRank rank);

  /// Asks the sources of one rank for all that they have; see make_room.
  void reclaim(RoomRank rank, Device& device) const;
  /// Asks sources until `nbytes` can be charged; those of one rank in the order in which they came.
  /// A source that fails is on record with the device, and the next one is asked.
  /// @param asking  Not asked itself; may be null. @param last  Later ranks are not asked. @return
  /// whether there is so much room now.
  bool make_room(std::size_t nbytes, const RoomSource* asking, RoomRank last, const Budget& budget,
                 Device& device) const;

 private:
  static void ask(RoomSource& source, std::size_t nbytes, Device& device);

  struct Ranked {
    RoomRank rank;
    std::weak_ptr<RoomSource> source;
  };

  mutable std::mutex mutex_;
  std::vector<Ranked> sources_;  // by rank, then by age
};

}  // namespace penstock
