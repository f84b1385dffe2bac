#include "frames/frames_region.hpp"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "error/error.hpp"

namespace penstock {

std::shared_ptr<FramesRegion> FramesRegion::create(std::shared_ptr<FramePool> pool,
                                                   std::shared_ptr<HostTier> tier) {
  if (tier->nbytes() == 0 || tier->page_size() != pool->frame_size()) {
    throw std::invalid_argument("a host tier of " + std::to_string(tier->nbytes()) +
                                " bytes in pages of " + std::to_string(tier->page_size()) +
                                " does not go with frames of " +
                                std::to_string(pool->frame_size()));
  }
  const std::shared_ptr<FramesRegion> region(new FramesRegion(std::move(pool), std::move(tier)));
  offer_room(region);
  return region;
}

FramesRegion::FramesRegion(std::shared_ptr<FramePool> pool, std::shared_ptr<HostTier> tier)
    : Region(pool->device(), tier->nbytes(), tier->page_size()),
      pool_(std::move(pool)),
      tier_(std::move(tier)),
      memory_(device_, page_count() * page_size_),
      pages_(page_count()),
      waits_pass_errors_(device_->info().kind == DeviceKind::kHost),
      events_(device_, Timing::kOff),
      timed_events_(device_, Timing::kOn),
      copies_(device_) {
  address_ = memory_.address();
}

FramesRegion::~FramesRegion() {
  const std::lock_guard lock(mutex_);
  writable_ = false;  // nobody can read it any more
  for (Page& page : pages_) page.dirty = false;
  settle_copies();
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    if (pages_[page].place == kNowhere) continue;
    try {
      quiesce(page);
      unmap(page);
    } catch (const std::exception& error) {
      device_->suppress(error.what());
    }
  }
}

// ---- using pages -------------------------------------------------------------------------------

void FramesRegion::check_pages(const std::vector<PageIndex>& pages) const {
  for (const PageIndex page : pages) {
    if (page >= pages_.size()) {
      throw std::out_of_range("page " + std::to_string(page) + " of a region of " +
                              std::to_string(pages_.size()) + " pages");
    }
  }
}

bool FramesRegion::begin(const std::vector<PageIndex>& pages, StreamHandle stream) {
  for (std::size_t lacked = 0;; ++lacked) {
    try {
      return begin_pages(pages, stream);
    } catch (const CapExceededError& error) {
      // A frame at a time, so that others lose no more than is lacking.
      if (lacked == pages.size() || !ask_others(error.requested)) throw;
    }
  }
}

bool FramesRegion::begin_in_place(const std::vector<PageIndex>& pages) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || !arranged_ || capture_) return false;
  const bool settled = std::all_of(pages.begin(), pages.end(), [&](PageIndex index) {
    const Page& page = pages_.at(index);
    return in_place(page, index) && !page.ready && places_[page.place].pages.size() == 1;
  });
  if (!settled) return false;
  ++uses_;
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    ++page.pins;
    page.last_use = uses_;
    page.used = true;
  }
  pins_ += pages.size();
  return true;
}

bool FramesRegion::begin_pages(const std::vector<PageIndex>& pages, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  for (const PageIndex page : pages) ++pages_[page].pins;  // so that none makes room for another
  pins_ += pages.size();
  PageIndex failed = kNobody;
  try {
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (!in_place(pages_[pages[i]], pages[i])) demand(pages, i);
    }
    if (capture_ && !pages.empty()) {  // copies follow each other: after the last, after them all
      const auto earlier = [&](PageIndex a, PageIndex b) {
        return pages_[a].load < pages_[b].load;
      };
      failed = *std::max_element(pages.begin(), pages.end(), earlier);
      order_after_load(pages_[failed], stream);
    }
    for (const PageIndex page : pages) {
      failed = page;
      order_after_load(pages_[page], stream);
    }
  } catch (...) {
    unpin(pages);
    if (failed != kNobody) forget(failed);
    throw;
  }
  ++uses_;
  bool shares = !arranged_ && !pages.empty();
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    page.last_use = uses_;
    page.used = true;
    shares = shares || places_[page.place].pages.size() > 1;
  }
  return shares;
}

void FramesRegion::order_after_load(Page& page, StreamHandle stream) {
  if (!page.ready) return;
  if (capture_) {
    std::uint64_t& known = capture_->loads[stream.value];
    if (page.load <= known) return;
    known = page.load;
    device_->event_wait(stream, page.ready->get());
    return;
  }
  // A load that is over is waited for here: that tells at once whether it failed, where a stream
  // would tell later, somewhere else. On a GPU asking costs more than ordering does, and a failure
  // is there to stay: only a page that stays is asked for, until it is there.
  const bool asks = waits_pass_errors_ || places_[page.place].pages.size() == 1;
  if (asks && device_->event_done(page.ready->get())) {
    if (waits_pass_errors_) device_->event_synchronize(page.ready->get());
    page.ready.reset();
    return;
  }
  // Most pages of a step, and of its neighbours, come by one copy.
  if (ordered_after(page.ready, stream)) return;
  device_->event_wait(stream, page.ready->get());
  awaited_[stream.value] = page.ready;
}

bool FramesRegion::ordered_after(const Event& load, StreamHandle stream) const {
  const auto known = awaited_.find(stream.value);
  return known != awaited_.end() && known->second == load;
}

void FramesRegion::note(Uses& uses, const Use& use) {
  for (Use& known : uses) {
    if (known.stream != use.stream) continue;
    if (known.number < use.number) known = use;
    return;
  }
  uses.push_back(use);
}

const Event& FramesRegion::event_of(Use& use) {
  if (use.event) return use.event;
  StreamEnd& end = stream_ends_[use.stream];
  if (!end.event || end.number < use.number) {
    end.event = events_.record({use.stream});
    end.number = uses_;
  }
  use.event = end.event;
  return use.event;
}

void FramesRegion::unpin(const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) --pages_[page].pins;
  pins_ -= pages.size();
  if (pins_ == 0) idle_.notify_all();
}

void FramesRegion::forget(PageIndex index) {
  const Page& page = pages_[index];
  if (page.pins > 0 || page.dirty || !in_place(page, index)) return;
  places_[page.place].owner = kNobody;
}

void FramesRegion::end(const std::vector<PageIndex>& pages, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  if (pages.empty()) return;
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const PageIndex page = pages[i];
    if (pages_[page].pins-- > 0) continue;
    for (++i; i > 0; --i) ++pages_[pages[i - 1]].pins;
    throw ScheduleError("end: page " + std::to_string(page) + " was not begun");
  }
  let_go(pages, stream);
  if (!verify_) return;
  for (const PageIndex index : pages) {
    const Page& page = pages_[index];
    if (page.pins == 0 && places_[page.place].pages.size() > 1) poison(places_[page.place]);
  }
}

bool FramesRegion::end_in_place(const std::vector<PageIndex>& pages, StreamHandle stream) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || verify_ || pages.empty()) return false;
  for (const PageIndex page : pages) --pages_[page].pins;
  let_go(pages, stream);
  return true;
}

void FramesRegion::let_go(const std::vector<PageIndex>& pages, StreamHandle stream) {
  pins_ -= pages.size();
  if (pins_ == 0) idle_.notify_all();
  Use last{stream.value, ++uses_, nullptr};
  if (capture_) last.event = events_.record(stream);  // of the graph, at this place
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    note(page.readers, last);
    note(places_[page.place].readers, last);
  }
}

bool FramesRegion::settled(const std::vector<PageIndex>& pages, StreamHandle stream) const {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  return std::all_of(pages.begin(), pages.end(), [&](PageIndex index) {
    const Event& ready = pages_[index].ready;
    return in_place(pages_[index], index) && (!ready || ordered_after(ready, stream));
  });
}

// ---- the schedule ------------------------------------------------------------------------------

void FramesRegion::set_schedule(std::vector<std::vector<PageIndex>> steps) {
  const std::lock_guard lock(mutex_);
  largest_step_ = 0;
  for (const auto& step : steps) largest_step_ = std::max(largest_step_, step.size());
  find_least_load();
  schedule_ = Schedule(pages_.size(), std::move(steps));
  now_ = 0;
}

void FramesRegion::advance(StepIndex step) {
  const std::lock_guard lock(mutex_);
  now_ = schedule_.time_of(step, now_);
}

// ---- writing back ------------------------------------------------------------------------------

void FramesRegion::require_writable() const {
  static_cast<void>(writable_tier());
}

bool FramesRegion::keeps_writes() const {
  return tier_->address() != nullptr;
}

void FramesRegion::note_write(std::size_t offset, std::size_t nbytes, StreamHandle stream) {
  const std::vector<PageIndex> touched = pages_of(offset, nbytes);
  const std::lock_guard lock(mutex_);
  std::byte* target = writable_tier();
  for (const PageIndex page : touched) {
    if (pages_[page].pins > 0 && in_place(pages_[page], page)) continue;
    throw ScheduleError("note_write: page " + std::to_string(page) + " is not in use");
  }
  if (capture_) {  // each replay writes again
    device_->copy(target + offset, address_ + offset, nbytes, stream);
    stats_.written_back_bytes += nbytes;
    return;
  }
  const Use last{stream.value, ++uses_, nullptr};
  for (const PageIndex page : touched) {
    pages_[page].dirty = true;
    note(pages_[page].readers, last);
    note(places_[pages_[page].place].readers, last);
  }
}

void FramesRegion::flush() {
  const std::lock_guard lock(mutex_);
  std::vector<PageIndex> copied;
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    if (!pages_[page].dirty) continue;
    order_after_readers(page, 1);
    if (copy_back(page)) copied.push_back(page);
  }
  if (copied.empty()) return;
  try {
    device_->stream_synchronize(copies_.get());
  } catch (...) {
    for (const PageIndex page : copied) pages_[page].dirty = true;
    throw;
  }
}

std::byte* FramesRegion::writable_tier() const {
  std::byte* address = tier_->address();
  if (address == nullptr) {
    throw ModelError("host tier \"" + tier_->kind() +
                     "\" cannot keep what is written: use host=\"pinned\"");
  }
  return address;
}

bool FramesRegion::copy_back(PageIndex page) {
  const bool written = pages_[page].dirty || (writable_ && pages_[page].used);
  if (!written || !in_place(pages_[page], page)) return false;
  const Event& ready = pages_[page].ready;  // before what was written, if that was said
  if (ready && !pages_[page].dirty && !wait_until_over(*device_, ready)) return false;
  const std::size_t start = std::size_t{page} * page_size_;
  const std::size_t nbytes = std::min(page_size_, nbytes_ - start);
  device_->copy(writable_tier() + start, address_of(page), nbytes, copies_.get());
  pages_[page].dirty = false;
  pages_[page].copied_back = true;
  stats_.written_back_bytes += nbytes;
  return true;
}

void FramesRegion::set_writable(bool writable) {
  const std::lock_guard lock(mutex_);
  if (writable) static_cast<void>(writable_tier());
  writable_ = writable;
}

void FramesRegion::set_verify(bool verify) {
  const std::lock_guard lock(mutex_);
  verify_ = verify;
}

// ---- figures -----------------------------------------------------------------------------------

RegionStats FramesRegion::stats() const {
  const std::lock_guard lock(mutex_);
  RegionStats stats;
  stats.resident_bytes = places_.size() * page_size_;
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    if (in_place(pages_[i], static_cast<PageIndex>(i))) ++stats.resident_pages;
    if (pages_[i].pins > 0) ++stats.pinned_pages;
  }
  stats.in_place_bytes = stats.resident_pages * page_size_;
  return stats;
}

std::size_t FramesRegion::frame_count() const {
  const std::lock_guard lock(mutex_);
  return places_.size();
}

std::uint64_t FramesRegion::mappings() const {
  const std::lock_guard lock(mutex_);
  return mappings_;
}

FramesStats FramesRegion::frames_stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace penstock
