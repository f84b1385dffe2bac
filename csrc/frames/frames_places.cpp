// How a frames region changes what is mapped where: taking and giving up frames, arranging pages on
// them, moving a page that is demanded where its place is in use.
#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "device/ranges.hpp"
#include "error/error.hpp"
#include "error/format.hpp"
#include "frames/frames_region.hpp"

namespace penstock {

void FramesRegion::map(PageIndex page, PlaceIndex place) {
  device_->map(address_of(page), places_[place].frame.handle(), page_size_);
  pages_[page].place = place;
  places_[place].pages.push_back(page);
  ++mappings_;
}

void FramesRegion::unmap(PageIndex index) {
  Page& page = pages_[index];
  device_->unmap(address_of(index), page_size_);
  ++mappings_;
  Place& place = places_[page.place];
  auto& mapped = place.pages;
  mapped.erase(std::remove(mapped.begin(), mapped.end(), index), mapped.end());
  if (place.owner == index) place.owner = kNobody;
  page.place = kNowhere;
  page.readers.clear();
  page.ready.reset();
}

void FramesRegion::quiesce(PageIndex index) {
  Page& page = pages_[index];
  if (page.ready && !wait_until_over(*device_, page.ready)) forget(index);
  page.ready.reset();
  for (Use& reader : page.readers) wait_until_over(*device_, event_of(reader));
  if (replayed_) wait_until_over(*device_, replay_end());
  const bool written = copy_back(index);
  if (!page.copied_back) return;
  page.copied_back = false;
  try {
    device_->stream_synchronize(copies_.get());
  } catch (...) {
    if (written) page.dirty = true;
    throw;
  }
}

void FramesRegion::settle_copies() noexcept {
  try {
    device_->stream_synchronize(copies_.get());
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
}

FramesRegion::PlaceIndex FramesRegion::add_place() {
  std::optional<Frame> frame = pool_->try_take(Tag::kWeights);
  if (!frame) return kNowhere;
  places_.emplace_back().frame = std::move(*frame);
  return static_cast<PlaceIndex>(places_.size() - 1);
}

FramesRegion::PlaceIndex FramesRegion::find_place() {
  // Ascending: a place without pages; a shared one without bytes; one whose owner was used, the
  // longest ago first; one that was loaded ahead, the latest first; a page's own.
  enum Kind : std::uint8_t { kSpare, kEmpty, kUsed, kAhead, kOwn };
  using Rank = std::tuple<Kind, std::uint64_t, PlaceIndex>;
  std::optional<Rank> best;
  for (std::size_t i = 0; i < places_.size(); ++i) {
    const Place& place = places_[i];
    if (!is_free(place)) continue;
    Rank rank{place.pages.empty() ? kSpare : kEmpty, 0, static_cast<PlaceIndex>(i)};
    if (place.owner != kNobody) {
      const Page& owner = pages_[place.owner];
      std::get<0>(rank) = owner.used ? kUsed : kAhead;
      std::get<1>(rank) = owner.used ? owner.last_use : ~owner.last_use;
    }
    if (arranged_ && place.pages.size() == 1) std::get<0>(rank) = kOwn;
    if (!best || rank < *best) best = rank;
  }
  // A new frame is dearer than a place that is shared anyway, and cheaper than one that is not.
  const Kind bearable = arranged_ ? kAhead : kSpare;
  if (!best || std::get<0>(*best) > bearable) {
    if (const PlaceIndex fresh = add_place(); fresh != kNowhere) return fresh;
  }
  if (!best) throw refusal(1);
  return std::get<2>(*best);
}

CapExceededError FramesRegion::refusal(std::size_t frames) const {
  const BudgetStats ledger = pool_->budget().stats();
  const auto in_use = static_cast<std::size_t>(
      std::count_if(pages_.begin(), pages_.end(), [](const Page& page) { return page.pins > 0; }));
  const std::size_t wanted = frames * page_size_;
  const std::size_t least = std::max(ledger.used + wanted, in_use * page_size_);
  const std::size_t held = places_.size() * page_size_;
  return {"cannot take " + format_bytes(wanted) + " more for a region of " + format_bytes(nbytes_) +
              ", which holds " + format_bytes(held) + " and needs " +
              format_bytes(in_use * page_size_) + " at once: the cap is " +
              format_bytes(ledger.cap) + " and " + format_bytes(ledger.used) +
              " are in use. Raise the cap to at least " + format_bytes(least) +
              ", or use less at once.",
          wanted, ledger.cap, ledger.used};
}

std::size_t FramesRegion::drop_empty_places() {
  std::size_t dropped = 0;
  for (std::size_t i = 0; i < places_.size();) {
    if (!places_[i].pages.empty()) {
      ++i;
      continue;
    }
    if (i + 1 < places_.size()) {
      places_[i] = std::move(places_.back());
      for (const PageIndex page : places_[i].pages) pages_[page].place = static_cast<PlaceIndex>(i);
    }
    places_.pop_back();
    ++dropped;
  }
  return dropped * page_size_;
}

std::size_t FramesRegion::evict(const std::vector<PageIndex>& pages) {
  const ScopedRange range("evict");
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    if (page.pins > 0 || page.place == kNowhere) continue;
    quiesce(index);
    unmap(index);
  }
  if (std::all_of(pages_.begin(), pages_.end(),
                  [](const Page& page) { return page.place == kNowhere; })) {
    arranged_ = false;
  }
  return drop_empty_places();
}

void FramesRegion::require_idle(const char* what) const {
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (pages_[i].pins == 0) continue;
    throw ScheduleError(std::string(what) + ": page " + std::to_string(i) +
                        " is in use; wait until no call of the model is under way");
  }
}

void FramesRegion::wait_for_idle(std::unique_lock<std::mutex>& lock) {
  // Operations hold pages while the host issues them; a pass of several threads has gaps.
  constexpr std::chrono::milliseconds kPatience{500};
  idle_.wait_for(lock, kPatience, [&] { return pins_ == 0; });
}

void FramesRegion::arrange(const Arrangement& wanted) {
  std::unique_lock lock(mutex_);
  if (wanted.slot.size() != pages_.size()) {
    throw std::invalid_argument("arrange: " + std::to_string(wanted.slot.size()) + " slots for " +
                                std::to_string(pages_.size()) + " pages");
  }
  std::size_t own = 0;
  for (const std::uint32_t slot : wanted.slot) {
    if (slot == Arrangement::kOwnFrame) {
      ++own;
    } else if (slot >= wanted.ring) {
      throw std::invalid_argument("arrange: slot " + std::to_string(slot) + " of a ring of " +
                                  std::to_string(wanted.ring));
    }
  }
  wait_for_idle(lock);
  require_idle("arrange");

  const std::size_t needed = own + wanted.ring;
  const std::size_t had = places_.size();
  try {
    while (places_.size() < needed) {
      if (add_place() == kNowhere) throw refusal(needed - places_.size());
    }
  } catch (...) {
    places_.resize(had);
    throw;
  }

  // Pages that have their bytes in place stay where they are, then slots, then the rest.
  std::vector<PlaceIndex> target(pages_.size(), kNowhere);
  std::vector<PlaceIndex> slots(wanted.ring, kNowhere);
  std::vector<bool> taken(places_.size(), false);
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (wanted.slot[i] != Arrangement::kOwnFrame) continue;
    if (!in_place(pages_[i], static_cast<PageIndex>(i))) continue;
    target[i] = pages_[i].place;
    taken[target[i]] = true;
  }
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (wanted.slot[i] == Arrangement::kOwnFrame || slots[wanted.slot[i]] != kNowhere) continue;
    const PlaceIndex place = pages_[i].place;
    if (place == kNowhere || taken[place]) continue;
    slots[wanted.slot[i]] = place;
    taken[place] = true;
  }
  PlaceIndex next = 0;
  const auto any = [&] {
    while (taken[next]) ++next;
    taken[next] = true;
    return next;
  };
  for (PlaceIndex& slot : slots) {
    if (slot == kNowhere) slot = any();
  }
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (wanted.slot[i] != Arrangement::kOwnFrame) {
      target[i] = slots[wanted.slot[i]];
    } else if (target[i] == kNowhere) {
      target[i] = any();
    }
  }

  for (PageIndex page = 0; page < pages_.size(); ++page) {
    if (pages_[page].place == target[page] || pages_[page].place == kNowhere) continue;
    quiesce(page);
    unmap(page);
  }
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    if (pages_[page].place == kNowhere) map(page, target[page]);
  }
  drop_empty_places();
  arranged_ = true;
  ring_ = wanted.ring;
  find_least_load();
}

void FramesRegion::place(PageIndex index) {
  Page& page = pages_[index];
  if (has_room(index)) return;
  if (capture_) {
    throw ScheduleError("page " + std::to_string(index) +
                        " needs another frame, which a capture cannot give: run the same call a "
                        "few times before capturing it");
  }
  const PlaceIndex target = find_place();
  if (page.place != kNowhere) {
    quiesce(index);
    unmap(index);
  }
  map(index, target);
  if (arranged_) ++stats_.remaps;
}

}  // namespace penstock
