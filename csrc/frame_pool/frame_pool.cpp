#include "frame_pool/frame_pool.hpp"

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace penstock {

Frame::Frame(std::shared_ptr<const FramePool> pool, FrameHandle handle, Tag tag) noexcept
    : pool_(std::move(pool)), handle_(handle), tag_(tag) {}

Frame::Frame(Frame&& other) noexcept
    : pool_(std::move(other.pool_)), handle_(other.handle_), tag_(other.tag_) {}

Frame& Frame::operator=(Frame&& other) noexcept {
  if (this == &other) return *this;
  release();
  pool_ = std::move(other.pool_);
  handle_ = other.handle_;
  tag_ = other.tag_;
  return *this;
}

Frame::~Frame() {
  release();
}

void Frame::release() noexcept {
  if (!pool_) return;
  {
    const InTransit leaving(*pool_->budget_);
    give_back();
  }
  pool_.reset();
}

void Frame::give_back() noexcept {
  try {
    pool_->device_->frame_release(handle_);
  } catch (const std::exception& error) {
    pool_->device_->suppress(error.what());
  }
  pool_->budget_->release(tag_, pool_->frame_size_);
}

std::shared_ptr<FramePool> FramePool::create(std::shared_ptr<Device> device,
                                             std::shared_ptr<Budget> budget,
                                             std::size_t frame_size) {
  return std::shared_ptr<FramePool>(new FramePool(std::move(device), std::move(budget), frame_size,
                                                  std::make_shared<RoomMaker>()));
}

std::shared_ptr<FramePool> FramePool::beside(std::size_t frame_size) const {
  return std::shared_ptr<FramePool>(new FramePool(device_, budget_, frame_size, room_));
}

FramePool::FramePool(std::shared_ptr<Device> device, std::shared_ptr<Budget> budget,
                     std::size_t frame_size, std::shared_ptr<RoomMaker> room)
    : device_(std::move(device)),
      budget_(std::move(budget)),
      frame_size_(frame_size),
      room_(std::move(room)) {
  const std::size_t granularity = device_->info().frame_granularity;
  if (frame_size == 0 || (frame_size & (frame_size - 1)) != 0 || frame_size % granularity != 0) {
    throw std::invalid_argument("page_size " + std::to_string(frame_size) +
                                " is not a power of two of at least " +
                                std::to_string(granularity) + " bytes, as frames need here");
  }
}

std::optional<Frame> FramePool::try_take(Tag tag) const {
  const InTransit coming(*budget_);
  if (!budget_->try_charge(tag, frame_size_)) return std::nullopt;
  ScopedCharge charge(*budget_, tag, frame_size_);
  const FrameHandle handle = device_->frame_create(frame_size_);
  charge.keep();
  return Frame(shared_from_this(), handle, tag);
}

void FramePool::add_source(std::weak_ptr<RoomSource> source, RoomRank rank) {
  room_->add_source(std::move(source), rank);
}

bool FramePool::make_room(std::size_t nbytes, const RoomSource* asking, RoomRank last) const {
  return room_->make_room(nbytes, asking, last, *budget_, *device_);
}

}  // namespace penstock
