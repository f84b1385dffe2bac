// How a frames region loads pages: ahead where that takes nothing away, on demand where it must.
#include <algorithm>
#include <cstring>
#include <string>

#include "device/ranges.hpp"
#include "error/error.hpp"
#include "frames/frames_region.hpp"
#include "io/file.hpp"
#include "schedule/copy_costs.hpp"
#include "schedule/page_lists.hpp"

namespace penstock {

namespace {

constexpr std::uint8_t kPoison = 0xFF;  // a NaN in every floating-point format

}  // namespace

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

void FramesRegion::find_least_load() {
  // What the largest step reads is in use meanwhile, and half of the rest is on its way.
  const std::size_t half = (ring_ - std::min(ring_, largest_step_)) / 2;
  least_load_ = std::max<std::size_t>(1, std::min(kLittleCopy / page_size_, half));
}

bool FramesRegion::shares_place(PageIndex page, PageIndex first) const {
  const auto begin = pages_.begin();
  return std::any_of(begin + first, begin + page,
                     [&](const Page& each) { return each.place == pages_[page].place; });
}

std::size_t FramesRegion::run_to_load(const std::vector<PageIndex>& pages, std::size_t start) {
  // Pages that the same step needs are one copy, where they lie together on both sides.
  const PageIndex first = pages[start];
  const std::size_t most = verify_ ? 1 : tier_->pages_together(first);
  const std::size_t wanted = capture_ ? run_to_capture(pages, start, most) : most;
  const StepTime use = schedule_.next_use(first, now_);
  std::size_t count = 1;
  for (std::size_t i = start + 1; count < wanted && i < pages.size(); ++i) {
    const PageIndex next = pages[i];
    if (next >= first && next < first + count) continue;  // steps that follow each other share it
    if (next != first + count || in_place(pages_[next], next)) break;
    const bool little = count * page_size_ < kLittleCopy;
    if (!capture_ && !little && schedule_.next_use(next, now_) != use) break;
    if (shares_place(next, first)) break;
    if (!may_load(next)) return capture_ && !waits_for_newest() ? 0 : count;  // soon there is more
    ++count;
  }
  return count;
}

// A graph has as few copies as its ring allows, since each costs its launch some microseconds, and
// as long as no step waits for two of them: the copy after these would wait for the step. So a copy
// brings what one step needs, or several steps that follow each other. Before a step that waits for
// the newest copy there is one behind it, smaller if need be, or the link would wait for that step.
std::size_t FramesRegion::run_to_capture(const std::vector<PageIndex>& pages, std::size_t start,
                                         std::size_t together) const {
  const PageIndex first = pages[start];
  std::size_t count = 0;  // pages of whole steps
  std::size_t run = 0;    // pages that follow each other
  for (std::size_t i = start; i < pages.size() && run < together; ++i) {
    const PageIndex next = pages[i];
    if (next >= first && next < first + run) continue;
    if (next != first + run || in_place(pages_[next], next)) break;
    if (run > 0 && schedule_.next_use(next, now_) != schedule_.next_use(next - 1, now_)) {
      if (count > 0 && run > capture_->most()) return count;
      count = run;
    }
    ++run;
  }
  if (count == 0 || run <= capture_->most()) count = run;
  return count < capture_->ring ? count : capture_->most();
}

bool FramesRegion::waits_for_newest() const {
  if (schedule_.empty()) return false;
  const auto step = static_cast<StepIndex>(now_ % schedule_.step_count());  // of time now_ + 1
  const auto& pages = schedule_.pages_of(step);
  return std::any_of(pages.begin(), pages.end(), [&](PageIndex page) {
    return in_place(pages_[page], page) && pages_[page].load == capture_->newest;
  });
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
    const bool timed = trace_ && !capture_;
    if (timed) start = timed_events_.record(copies_.get());
    copy_in(first, pieces);
    ready = (timed ? timed_events_ : events_).record(copies_.get());
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
  if (capture_) {
    ++capture_->copies;
    capture_->newest = uses_;
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
      if (last.offset + last.nbytes == offset && last.source + last.nbytes == piece.source &&
          last.file == piece.file) {
        last.nbytes += piece.nbytes;
        continue;
      }
    }
    pieces.push_back(piece);
    pieces.back().offset = offset;
  }
}

void FramesRegion::order_after_readers(PageIndex first, std::size_t count) {
  if (!fenced_) device_->event_wait(copies_.get(), replay_end()->get());
  fenced_ = true;
  Uses uses = uses_to_await(first, count);
  for (Use& use : uses) device_->event_wait(copies_.get(), event_of(use)->get());
  for (std::size_t i = 0; i < count; ++i) places_[pages_[first + i].place].readers.clear();
  // On the host a stream passes on what it waited for: a reader's failure, which is not the copy's.
  // It goes with this record, which nobody asks.
  if (waits_pass_errors_ && !uses.empty()) events_.record(copies_.get());
}

FramesRegion::Uses FramesRegion::uses_to_await(PageIndex first, std::size_t count) {
  Uses uses;
  for (std::size_t i = 0; i < count; ++i) {
    for (Use& use : places_[pages_[first + i].place].readers) {
      static_cast<void>(event_of(use));
      if (capture_) {
        note(uses, use);  // later work of a stream is ordered after its earlier
        continue;
      }
      // The places of one step have its event in common. Streams come and go: the later use of one
      // may not be after the earlier use of another that had its handle.
      const auto same = [&](const Use& known) { return known.event == use.event; };
      if (std::none_of(uses.begin(), uses.end(), same)) uses.push_back(use);
    }
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
    if (piece.file != nullptr) {
      device_->copy_mapped(target + piece.offset, piece.source, *piece.file, piece.file_offset,
                           piece.nbytes, copies_.get());
    } else {
      device_->copy(target + piece.offset, piece.source, piece.nbytes, copies_.get());
    }
  }
  if (verify_) verify_load(first, pieces);
}

void FramesRegion::verify_load(PageIndex page, const std::vector<Piece>& pieces) {
  loaded_.resize(page_size_);
  device_->copy(loaded_.data(), address_of(page), page_size_, copies_.get());
  device_->stream_synchronize(copies_.get());
  tier_->verify(page, loaded_.data());
  std::vector<std::byte> in_file;
  for (const Piece& piece : pieces) {
    const std::byte* source = piece.source;
    if (piece.file != nullptr) {
      in_file.resize(piece.nbytes);
      piece.file->read(in_file.data(), piece.file_offset, piece.nbytes);
      source = in_file.data();
    }
    if (std::memcmp(loaded_.data() + piece.offset, source, piece.nbytes) == 0) continue;
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

}  // namespace penstock
