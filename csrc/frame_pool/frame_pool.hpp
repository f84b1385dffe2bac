// A frame is a fixed-size piece of physical device memory. The pool makes frames and owns none of
// them: each is charged to the budget before the device is asked for it, and given back, memory
// first and charge second, when its owner lets go of it. Who maps a frame unmaps it before that, or
// the memory outlives its charge. Making a frame costs well under a millisecond per GiB, so nothing
// is kept in reserve: the cap belongs to whoever needs it next. Who is refused one may ask for
// room, holding no lock (see room.hpp). Thread-safe.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>

#include "budget/budget.hpp"
#include "device/device.hpp"
#include "frame_pool/room.hpp"

namespace penstock {

class FramePool;

/// Owns one frame and its charge. Movable.
class Frame {
 public:
  Frame() = default;
  Frame(Frame&& other) noexcept;
  Frame& operator=(Frame&& other) noexcept;
  ~Frame();

  FrameHandle handle() const noexcept { return handle_; }
  explicit operator bool() const noexcept { return pool_ != nullptr; }

 private:
  friend class FramePool;
  Frame(std::shared_ptr<const FramePool> pool, FrameHandle handle, Tag tag) noexcept;
  void release() noexcept;
  void give_back() noexcept;

  std::shared_ptr<const FramePool> pool_;
  FrameHandle handle_;
  Tag tag_ = Tag::kWeights;
};

class FramePool : public std::enable_shared_from_this<FramePool> {
 public:
  /// @param frame_size  Bytes of a frame.
  /// @throws std::invalid_argument unless it is a power of two and a multiple of the device's
  ///         granularity.
  static std::shared_ptr<FramePool> create(std::shared_ptr<Device> device,
                                           std::shared_ptr<Budget> budget, std::size_t frame_size);
  /// A pool of frames of another size under the same budget, with the same sources of room.
  /// @throws std::invalid_argument as `create` does.
  std::shared_ptr<FramePool> beside(std::size_t frame_size) const;
  FramePool(const FramePool&) = delete;
  FramePool& operator=(const FramePool&) = delete;

  /// A frame, or none where the cap does not allow one. @throws DeviceError
  std::optional<Frame> try_take(Tag tag) const;

  /// Adds somebody who can give frames back. Held weakly.
  void add_source(std::weak_ptr<RoomSource> source, RoomRank rank);
  /// Asks those who can give for room, in the order of ranks, until `nbytes` are free. The caller
  /// holds no lock of its own. @param asking  Who is not asked; may be null.
  /// @return whether `nbytes` can be charged now; somebody else may be faster.
  bool make_room(std::size_t nbytes, const RoomSource* asking,
                 RoomRank last = RoomRank::kOverflow) const;

  /// Takes back what those hold who are in nobody's charge any more.
  void reclaim_retired() const { room_->reclaim(RoomRank::kRetired, *device_); }

  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  Budget& budget() const noexcept { return *budget_; }
  std::size_t frame_size() const noexcept { return frame_size_; }

 private:
  friend class Frame;
  FramePool(std::shared_ptr<Device> device, std::shared_ptr<Budget> budget, std::size_t frame_size,
            std::shared_ptr<RoomMaker> room);

  std::shared_ptr<Device> device_;
  std::shared_ptr<Budget> budget_;
  std::size_t frame_size_;
  std::shared_ptr<RoomMaker> room_;
};

}  // namespace penstock
