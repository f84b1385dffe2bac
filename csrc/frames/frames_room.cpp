// How a frames region gives frames back where others need room under the cap.
#include <algorithm>
#include <functional>
#include <memory>
#include <utility>

#include "device/ranges.hpp"
#include "frames/frames_region.hpp"

namespace penstock {

namespace {

thread_local const FramesRegion* asking = nullptr;  // whose operation asks on this thread

}  // namespace

/// What the pool asks: one for each rank of what a region can do without.
class FramesRegion::Room : public RoomSource {
 public:
  Room(std::weak_ptr<FramesRegion> region, RoomRank rank)
      : region_(std::move(region)), rank_(rank) {}

  std::size_t give_back(std::size_t nbytes) override {
    const auto region = region_.lock();
    return region ? region->give_back(rank_, nbytes) : 0;
  }

 private:
  std::weak_ptr<FramesRegion> region_;
  RoomRank rank_;
};

void FramesRegion::offer_room(const std::shared_ptr<FramesRegion>& region) {
  for (const RoomRank rank : {RoomRank::kRetired, RoomRank::kCachedFrames, RoomRank::kResidentSet,
                              RoomRank::kRing, RoomRank::kLargestStep}) {
    region->sources_.push_back(std::make_shared<Room>(region, rank));
    region->pool_->add_source(region->sources_.back(), rank);
  }
}

void FramesRegion::set_active(bool active) {
  const std::lock_guard lock(mutex_);
  active_ = active;
}

void FramesRegion::retire() {
  const std::lock_guard lock(mutex_);
  retired_ = true;
  active_ = false;
  protected_ = false;
}

void FramesRegion::set_protected(bool is_protected) {
  const std::lock_guard lock(mutex_);
  protected_ = is_protected;
}

bool FramesRegion::ask_others(std::size_t nbytes) const {
  const FramesRegion* const before = std::exchange(asking, this);
  const bool made = pool_->make_room(nbytes, nullptr, RoomRank::kLargestStep);
  asking = before;
  return made;
}

std::size_t FramesRegion::give_back(RoomRank rank, std::size_t nbytes) {
  if (asking == this) return 0;  // all that is left here is being read
  const ScopedRange range("give back");
  const std::lock_guard lock(mutex_);
  if (capture_ || replaying_ || protected_) return 0;  // a graph has its pages where they are
  const std::vector<PlaceIndex> places = places_to_give(rank);
  const std::size_t count = std::min(places.size(), (nbytes + page_size_ - 1) / page_size_);
  try {
    for (std::size_t i = 0; i < count; ++i) {
      const std::vector<PageIndex> mapped = places_[places[i]].pages;
      for (const PageIndex page : mapped) {
        quiesce(page);
        unmap(page);
      }
    }
  } catch (...) {
    drop_empty_places();
    throw;
  }
  return drop_empty_places();
}

std::vector<FramesRegion::PlaceIndex> FramesRegion::places_to_give(RoomRank rank) const {
  if (rank == RoomRank::kRetired && !retired_) return {};
  const bool idle = rank == RoomRank::kRetired || rank == RoomRank::kCachedFrames;
  if (idle == active_) return {};
  const bool all = idle || rank == RoomRank::kLargestStep;
  std::vector<std::pair<StepTime, PlaceIndex>> found;  // by the next use of the page in it
  for (std::size_t i = 0; i < places_.size(); ++i) {
    const Place& place = places_[i];
    const bool own = arranged_ && place.pages.size() == 1;
    if (!all && own != (rank == RoomRank::kResidentSet)) continue;
    const auto in_use = [&](PageIndex page) { return pages_[page].pins > 0; };
    if (std::any_of(place.pages.begin(), place.pages.end(), in_use)) continue;
    const PageIndex page = own ? place.pages.front() : place.owner;
    const StepTime next = page == kNobody ? kNever : schedule_.next_use(page, now_);
    found.emplace_back(next, static_cast<PlaceIndex>(i));
  }
  std::sort(found.begin(), found.end(), std::greater<>());
  if (!all) {  // what the largest step needs stays
    const std::size_t least = std::max<std::size_t>(largest_step_, 1);
    const std::size_t spare = places_.size() - std::min(places_.size(), least);
    found.resize(std::min(found.size(), spare));
  }
  std::vector<PlaceIndex> places;
  places.reserve(found.size());
  for (const auto& [next, place] : found) places.push_back(place);
  return places;
}

}  // namespace penstock
