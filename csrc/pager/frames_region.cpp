#include "pager/frames_region.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "device/ranges.hpp"
#include "error/error.hpp"
#include "pager/page_runs.hpp"

namespace penstock {

namespace {

constexpr std::uint8_t kPoison = 0xFF;  // a NaN in every floating-point format

void note_reader(std::vector<std::pair<void*, Event>>& readers, StreamHandle stream,
                 const Event& use) {
  for (auto& reader : readers) {
    if (reader.first != stream.value) continue;
    reader.second = use;
    return;
  }
  readers.emplace_back(stream.value, use);
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
  writable_ = false;  // nobody can read it any more
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
    for (const PageIndex page : pages) {
      if (!in_place(pages_[page], page)) demand(page);
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
  if (!capturing_ && device_->event_done(page.ready->get())) {
    device_->event_synchronize(page.ready->get());
    page.ready.reset();
  } else if (!capturing_ || page.waited != stream.value) {
    device_->event_wait(stream, page.ready->get());
    page.waited = stream.value;
  }
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
  for (const PageIndex index : pages) {
    Page& page = pages_[index];
    note_reader(page.readers, stream, use);
    note_reader(places_[page.place].readers, stream, use);
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

std::size_t FramesRegion::run_to_load(const std::vector<PageIndex>& pages, std::size_t start) {
  // Pages that the same step needs are one copy, where they lie together on both sides. A graph has
  // fewer and larger copies, since each costs its launch some microseconds.
  const PageIndex first = pages[start];
  const std::size_t together = verify_ ? 1 : tier_->pages_together(first);
  const std::size_t most = capturing_ ? std::min(together, captured_run_) : together;
  const StepTime use = schedule_.next_use(first, now_);
  std::size_t count = 1;
  for (std::size_t i = start + 1; count < most && i < pages.size(); ++i) {
    const PageIndex next = pages[i];
    if (next >= first && next < first + count) continue;  // steps that follow each other share it
    if (next != first + count || in_place(pages_[next], next)) break;
    if (!capturing_ && schedule_.next_use(next, now_) != use) break;
    bool shares = false;
    for (PageIndex page = first; page < next; ++page) {
      shares = shares || pages_[page].place == pages_[next].place;
    }
    if (shares) break;
    if (!may_load(next)) return capturing_ ? 0 : count;  // soon there is room for more at once
    ++count;
  }
  return count;
}

void FramesRegion::load(PageIndex first, std::size_t count, bool demanded) {
  const auto end = static_cast<PageIndex>(first + count);
  const ScopedRange range(demanded ? "demanded load" : "load");
  std::vector<Piece> pieces;
  std::vector<PageIndex> overwritten;
  Event start;
  Event ready;
  PageIndex fetched = first;
  try {
    for (; fetched < end; ++fetched) add_pieces(pieces, fetched, first);
    order_after_readers(first, count);
    for (PageIndex page = first; page < end; ++page) {
      PageIndex& owner = places_[pages_[page].place].owner;
      if (owner == kNobody) continue;
      copy_back(owner);
      overwritten.push_back(owner);
      owner = kNobody;
    }
    if (trace_ && !capturing_) start = events_.record(copies_.get());
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
    page.waited.reset();
    page.last_use = uses_;
    page.used = false;
  }
  stats_.loaded_bytes += count * page_size_;
  if (demanded) stats_.demand_loads += count;
  notify_load(first, count, count * page_size_, start, ready, demanded);
  if (!start) return;
  for_each_run(overwritten,
               [&](PageIndex page, std::size_t pages) { notify_evict(page, pages, start, start); });
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
  std::vector<const OwnedEvent*> waited;  // the places of one step have its event in common
  for (std::size_t i = 0; i < count; ++i) {
    Place& place = places_[pages_[first + i].place];
    for (const auto& [stream, use] : place.readers) {
      if (std::find(waited.begin(), waited.end(), use.get()) != waited.end()) continue;
      device_->event_wait(copies_.get(), use->get());
      waited.push_back(use.get());
    }
    place.readers.clear();
  }
  // On the host a stream passes on what it waited for: a reader's failure, which is not the copy's.
  // It goes with this record, which nobody asks.
  if (waits_pass_errors_ && !waited.empty()) events_.record(copies_.get());
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
  order_after_readers(owner, 1);
  copy_back(owner);
  place.owner = kNobody;
  device_->fill(address_of(owner), kPoison, page_size_, copies_.get());
  try {
    pages_[owner].ready = events_.record(copies_.get());
  } catch (...) {
    settle_copies();
    throw;
  }
}

void FramesRegion::demand(PageIndex index) {
  Page& page = pages_[index];
  if (page.place == kNowhere || !is_free(places_[page.place])) {
    if (capturing_) {
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
  load(index, 1, true);
}

void FramesRegion::write_back(std::size_t offset, std::size_t nbytes, StreamHandle stream) {
  const std::vector<PageIndex> touched = pages_of(offset, nbytes);
  const std::lock_guard lock(mutex_);
  std::byte* target = writable_tier();
  for (const PageIndex page : touched) {
    if (pages_[page].pins > 0 && in_place(pages_[page], page)) continue;
    throw ScheduleError("write_back: page " + std::to_string(page) + " is not in use");
  }
  device_->copy(target + offset, address_ + offset, nbytes, stream);
  stats_.written_back_bytes += nbytes;
}

std::byte* FramesRegion::writable_tier() const {
  std::byte* address = tier_->address();
  if (address == nullptr) {
    throw DeviceError("write_back", 0,
                      "weights were written to, but host tier \"" + tier_->kind() +
                          "\" cannot keep that: use host=\"pinned\"");
  }
  return address;
}

bool FramesRegion::copy_back(PageIndex page) {
  if (!writable_ || !pages_[page].used || !in_place(pages_[page], page)) return false;
  if (pages_[page].ready && !wait_quietly(pages_[page].ready)) return false;  // never loaded
  const std::size_t start = std::size_t{page} * page_size_;
  const std::size_t nbytes = std::min(page_size_, nbytes_ - start);
  device_->copy(writable_tier() + start, address_of(page), nbytes, copies_.get());
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

FramesStats FramesRegion::frames_stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace penstock
