#include "frame_pool/room.hpp"

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>

namespace penstock {

namespace {

// Sources that are giving on this thread, innermost first.
struct Giving {
  const RoomSource* source;
  const Giving* outer;
};
thread_local const Giving* innermost = nullptr;

bool is_giving(const RoomSource* source) {
  for (const Giving* at = innermost; at != nullptr; at = at->outer) {
    if (at->source == source) return true;
  }
  return false;
}

class ScopedGiving {
 public:
  explicit ScopedGiving(const RoomSource* source) : giving_{source, innermost} {
    innermost = &giving_;
  }
  ~ScopedGiving() { innermost = giving_.outer; }
  ScopedGiving(const ScopedGiving&) = delete;
  ScopedGiving& operator=(const ScopedGiving&) = delete;

 private:
  Giving giving_;
};

}  // namespace

void RoomMaker::add_source(std::weak_ptr<RoomSource> source, RoomRank rank) {
  const std::lock_guard lock(mutex_);
  sources_.erase(std::remove_if(sources_.begin(), sources_.end(),
                                [](const Ranked& known) { return known.source.expired(); }),
                 sources_.end());
  const auto after =
      std::upper_bound(sources_.begin(), sources_.end(), rank,
                       [](RoomRank wanted, const Ranked& known) { return wanted < known.rank; });
  sources_.insert(after, Ranked{rank, std::move(source)});
}

void RoomMaker::ask(RoomSource& source, std::size_t nbytes, Device& device) {
  if (is_giving(&source)) return;
  const ScopedGiving giving(&source);
  try {
    source.give_back(nbytes);
  } catch (const std::exception& error) {
    device.suppress(error.what());
  }
}

void RoomMaker::reclaim(RoomRank rank, Device& device) const {
  constexpr std::size_t kAll = std::numeric_limits<std::size_t>::max() / 2;
  std::vector<Ranked> sources;
  {
    const std::lock_guard lock(mutex_);
    sources = sources_;
  }
  for (const Ranked& ranked : sources) {
    const std::shared_ptr<RoomSource> source = ranked.source.lock();
    if (source && ranked.rank == rank) ask(*source, kAll, device);
  }
}

bool RoomMaker::make_room(std::size_t nbytes, const RoomSource* asking, RoomRank last,
                          const Budget& budget, Device& device) const {
  std::vector<Ranked> sources;
  {
    const std::lock_guard lock(mutex_);
    sources = sources_;
  }
  for (const Ranked& ranked : sources) {
    const std::size_t available = budget.available();
    if (available >= nbytes) return true;
    if (ranked.rank > last) break;
    const std::shared_ptr<RoomSource> source = ranked.source.lock();
    if (source && source.get() != asking) ask(*source, nbytes - available, device);
  }
  return budget.available() >= nbytes;
}

}  // namespace penstock
