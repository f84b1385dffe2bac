#include "pager/frames_region.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "device/ranges.hpp"
#include "error/error.hpp"

namespace penstock {

namespace {

constexpr std::uint8_t kPoison = 0xFF;  // a NaN in every floating-point format

/// Remembers the last use on each stream.
template <typename Use>
void note(std::vector<Use>& uses, const Use& use) {
  for (Use& known : uses) {
    if (known.stream != use.stream) continue;
    if (known.number < use.number) known = use;
    return;
  }
  uses.push_back(use);
}

}  // namespace

std::shared_ptr<FramesRegion> FramesRegion::create(std::shared_ptr<FramePool> pool,
                                                   std::shared_ptr<HostTier> tier) {
  if (tier->nbytes() == 0 || tier->page_size() != pool->frame_size()) {
    throw std::invalid_argument("a host tier of " + std::to_string(tier->nbytes()) +
                                " bytes in pages of " + std::to_string(tier->page_size()) +
                                " does not go with frames of " +
                                std::to_string(pool->frame_size()));
  }
  return std::shared_ptr<FramesRegion>(new FramesRegion(std::move(pool), std::move(tier)));
}

FramesRegion::FramesRegion(std::shared_ptr<FramePool> pool, std::shared_ptr<HostTier> tier)
    : Region(pool->device(), tier->nbytes(), tier->page_size()),
      pool_(std::move(pool)),
      tier_(std::move(tier)),
      memory_(device_, page_count() * page_size_),
      pages_(page_count()),
      waits_pass_errors_(device_->info().kind == DeviceKind::kHost),
      events_(device_, Timing::kOn),
      copies_(device_) {
  address_ = memory_.address();
}

FramesRegion::~FramesRegion() {
  const std::lock_guard lock(mutex_);
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

void FramesRegion::begin(const std::vector<PageIndex>& pages, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  for (const PageIndex page : pages) ++pages_[page].pins;  // so that none makes room for another
  PageIndex failed = kNobody;
  try {
    for (std::size_t i = 0; i < pages.size(); ++i) {
      if (!in_place(pages_[pages[i]], pages[i])) demand(pages, i);
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
  for (const PageIndex page : pages) {
    pages_[page].last_use = uses_;
    pages_[page].used = true;
  }
}

void FramesRegion::order_after_load(Page& page, StreamHandle stream) {
  if (!page.ready) return;
  // A load that is over is waited for here: that tells at once whether it failed, where a stream
  // would tell later, somewhere else. A capture cannot ask.
  if (!capture_ && device_->event_done(page.ready->get())) {
    device_->event_synchronize(page.ready->get());
    page.ready.reset();
    return;
  }
  if (capture_) {
    std::uint64_t& known = capture_->loads[stream.value];
    if (page.load <= known) return;
    known = page.load;
  }
  device_->event_wait(stream, page.ready->get());
}

void FramesRegion::unpin(const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) --pages_[page].pins;
}

void FramesRegion::forget(PageIndex index) {
  const Page& page = pages_[index];
  if (page.pins == 0 && in_place(page, index)) places_[page.place].owner = kNobody;
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
  Event use;
  try {
    use = events_.record(stream);
  } catch (...) {
    // No event to remember the readers by: wait for them here. `stream` belongs to the device that
    // just failed, whose error says more than a second one.
    try {
      device_->stream_synchronize(stream);
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    throw;
  }
  const Use last{stream.value, use, ++uses_};
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    note(page.readers, last);
    note(places_[page.place].readers, last);
  }
  if (!verify_) return;
  for (const PageIndex index : pages) {
    const Page& page = pages_[index];
    if (page.pins == 0 && places_[page.place].pages.size() > 1) poison(places_[page.place]);
  }
}

bool FramesRegion::settled(const std::vector<PageIndex>& pages) const {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  return std::all_of(pages.begin(), pages.end(), [&](PageIndex index) {
    return in_place(pages_[index], index) && !pages_[index].ready;
  });
}

// ---- loading -----------------------------------------------------------------------------------

void FramesRegion::set_schedule(std::vector<std::vector<PageIndex>> steps) {
  const std::lock_guard lock(mutex_);
  schedule_ = Schedule(pages_.size(), std::move(steps));
  now_ = 0;
}

void FramesRegion::advance(StepIndex step) {
  const std::lock_guard lock(mutex_);
  now_ = schedule_.time_of(step, now_);
}

bool FramesRegion::may_load(PageIndex index) {
  const Page& page = pages_[index];
  if (page.place == kNowhere) return false;
  const PageIndex owner = places_[page.place].owner;
  if (owner != kNobody) {
    if (pages_[owner].pins > 0) return false;
    if (schedule_.next_use(owner, now_) <= schedule_.next_use(index, now_)) return false;
  }
  return tier_->ready(index);
}

std::size_t FramesRegion::load_ahead(const std::vector<PageIndex>& pages) {
  const std::lock_guard lock(mutex_);
  check_pages(pages);
  std::size_t there = 0;
  while (there < pages.size()) {
    const PageIndex first = pages[there];
    if (in_place(pages_[first], first)) {
      ++there;
      continue;
    }
    if (!may_load(first)) break;
    const std::size_t count = run_to_load(pages, there);
    if (count == 0) break;
    load(first, count, false);
  }
  return there;
}

bool FramesRegion::shares_place(PageIndex page, PageIndex first) const {
  const auto begin = pages_.begin();
  return std::any_of(begin + first, begin + page,
                     [&](const Page& each) { return each.place == pages_[page].place; });
}

std::size_t FramesRegion::run_to_load(const std::vector<PageIndex>& pages, std::size_t start) {
  // Pages that the same step needs are one copy, where they lie together on both sides. A graph has
  // as few copies as its ring allows, since each costs its launch some microseconds.
  const PageIndex first = pages[start];
  const std::size_t most = verify_ ? 1 : tier_->pages_together(first);
  const StepTime use = schedule_.next_use(first, now_);
  std::size_t count = 1;
  for (std::size_t i = start + 1; count < most && i < pages.size(); ++i) {
    const PageIndex next = pages[i];
    if (next >= first && next < first + count) continue;  // steps that follow each other share it
    if (next != first + count || in_place(pages_[next], next)) break;
    if (!capture_ && schedule_.next_use(next, now_) != use) break;
    if (shares_place(next, first)) break;
    if (!may_load(next)) return capture_ ? 0 : count;  // soon there is room for more at once
    ++count;
  }
  return count;
}

void FramesRegion::load(PageIndex first, std::size_t count, bool demanded) {
  const auto end = static_cast<PageIndex>(first + count);
  const ScopedRange range(demanded ? "demanded load" : "load");
  std::vector<Piece> pieces;
  Event start;
  Event ready;
  PageIndex fetched = first;
  try {
    for (; fetched < end; ++fetched) add_pieces(pieces, fetched, first);
    for (PageIndex page = first; page < end; ++page) places_[pages_[page].place].owner = kNobody;
    order_after_readers(first, count);
    if (trace_ && !capture_) start = events_.record(copies_.get());
    copy_in(first, pieces);
    ready = events_.record(copies_.get());
  } catch (...) {
    settle_copies();
    for (PageIndex page = first; page < fetched; ++page) tier_->release(page, nullptr);
    throw;
  }
  ++uses_;
  for (PageIndex index = first; index < end; ++index) {
    tier_->release(index, ready);
    Page& page = pages_[index];
    places_[page.place].owner = index;
    page.ready = ready;
    page.load = uses_;
    page.last_use = uses_;
    page.used = false;
  }
  stats_.loaded_bytes += count * page_size_;
  if (demanded) stats_.demand_loads += count;
  notify_load(first, count, count * page_size_, start, ready, demanded);
}

void FramesRegion::add_pieces(std::vector<Piece>& pieces, PageIndex page, PageIndex first) {
  const std::size_t shift = std::size_t{page - first} * page_size_;
  for (const Piece& piece : tier_->fetch(page)) {
    const std::size_t offset = shift + piece.offset;
    if (!pieces.empty() && page > first) {
      Piece& last = pieces.back();
      if (last.offset + last.nbytes == offset && last.source + last.nbytes == piece.source) {
        last.nbytes += piece.nbytes;
        continue;
      }
    }
    pieces.push_back({piece.source, offset, piece.nbytes});
  }
}

void FramesRegion::order_after_readers(PageIndex first, std::size_t count) {
  if (!fenced_) device_->event_wait(copies_.get(), replay_end()->get());
  fenced_ = true;
  const std::vector<Use> uses = uses_to_await(first, count);
  for (const Use& use : uses) device_->event_wait(copies_.get(), use.event->get());
  // On the host a stream passes on what it waited for: a reader's failure, which is not the copy's.
  // It goes with this record, which nobody asks.
  if (waits_pass_errors_ && !uses.empty()) events_.record(copies_.get());
}

std::vector<FramesRegion::Use> FramesRegion::uses_to_await(PageIndex first, std::size_t count) {
  std::vector<Use> uses;
  for (std::size_t i = 0; i < count; ++i) {
    Readers& readers = places_[pages_[first + i].place].readers;
    for (const Use& use : readers) {
      if (capture_) {
        note(uses, use);  // later work of a stream is ordered after its earlier
        continue;
      }
      // The places of one step have its event in common. Streams come and go: the later use of one
      // may not be after the earlier use of another that had its handle.
      const auto same = [&](const Use& known) { return known.event == use.event; };
      if (std::none_of(uses.begin(), uses.end(), same)) uses.push_back(use);
    }
    readers.clear();
  }
  if (!capture_) return uses;
  const auto known = [&](const Use& use) {
    std::uint64_t& last = capture_->uses[use.stream];
    if (use.number <= last) return true;
    last = use.number;
    return false;
  };
  uses.erase(std::remove_if(uses.begin(), uses.end(), known), uses.end());
  return uses;
}

void FramesRegion::copy_in(PageIndex first, const std::vector<Piece>& pieces) {
  std::byte* target = address_of(first);
  if (verify_) device_->fill(target, kPoison, page_size_, copies_.get());
  for (const Piece& piece : pieces) {
    device_->copy(target + piece.offset, piece.source, piece.nbytes, copies_.get());
  }
  if (verify_) verify_load(first, pieces);
}

void FramesRegion::verify_load(PageIndex page, const std::vector<Piece>& pieces) {
  loaded_.resize(page_size_);
  device_->copy(loaded_.data(), address_of(page), page_size_, copies_.get());
  device_->stream_synchronize(copies_.get());
  for (const Piece& piece : pieces) {
    if (std::memcmp(loaded_.data() + piece.offset, piece.source, piece.nbytes) == 0) continue;
    throw DeviceError(
        "copy", 0,
        "page " + std::to_string(page) + " differs from its source after it was loaded, within " +
            std::to_string(piece.nbytes) + " bytes at " + std::to_string(piece.offset));
  }
}

void FramesRegion::poison(Place& place) {
  if (place.owner == kNobody) return;
  const PageIndex owner = place.owner;
  place.owner = kNobody;
  order_after_readers(owner, 1);
  device_->fill(address_of(owner), kPoison, page_size_, copies_.get());
  try {
    pages_[owner].ready = events_.record(copies_.get());
  } catch (...) {
    settle_copies();
    throw;
  }
}

void FramesRegion::demand(const std::vector<PageIndex>& pages, std::size_t start) {
  const PageIndex first = pages[start];
  place(first);
  const std::size_t most = verify_ ? 1 : tier_->pages_together(first);
  std::size_t count = 1;
  for (std::size_t i = start + 1; count < most && i < pages.size(); ++i) {
    const PageIndex next = pages[i];
    if (next != first + count || in_place(pages_[next], next)) break;
    if (!has_room(next) || shares_place(next, first)) break;
    ++count;
  }
  load(first, count, true);
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

void FramesRegion::write_back(std::size_t offset, std::size_t nbytes, StreamHandle stream) {
  const std::vector<PageIndex> touched = pages_of(offset, nbytes);
  const std::lock_guard lock(mutex_);
  std::byte* target = tier_->address();
  if (target == nullptr) {
    throw DeviceError("write_back", 0,
                      "weights were written to, but host tier \"" + tier_->kind() +
                          "\" cannot keep that: use host=\"pinned\"");
  }
  for (const PageIndex page : touched) {
    if (pages_[page].pins > 0 && in_place(pages_[page], page)) continue;
    throw ScheduleError("write_back: page " + std::to_string(page) + " is not in use");
  }
  device_->copy(target + offset, address_ + offset, nbytes, stream);
  stats_.written_back_bytes += nbytes;
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

FramesStats FramesRegion::frames_stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace penstock
