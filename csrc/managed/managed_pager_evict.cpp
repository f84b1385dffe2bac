// What the managed pager does on its evict thread.
#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "error/error.hpp"
#include "managed/managed_pager.hpp"
#include "managed/region_pages.hpp"
#include "schedule/page_lists.hpp"

namespace penstock {

void ManagedPager::issue_evict(ManagedRegion& region, const std::vector<PageIndex>& pages,
                               const OwnedStream& stream) {
  for_each_run(pages, [&](PageIndex first, std::size_t count) {
    device_->managed_evict(address_of(region, first), run_bytes(region, first, count),
                           region.access(), stream.get());
  });
}

void ManagedPager::mark_evicting(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) region.table_.begin_evict(page);
  evicting_bytes_ += bytes_of(region, pages);
}

void ManagedPager::unmark_evicting(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) region.table_.cancel_evict(page);
  evicting_bytes_ -= bytes_of(region, pages);
}

void ManagedPager::begin_evictions(const std::vector<std::shared_ptr<Eviction>>& evictions) {
  for (const auto& eviction : evictions) {
    try {
      // Before what else is to be evicted: a load waits for this.
      evict_thread_.submit([this, eviction] { carry_out(*eviction); }, TaskThread::Order::kFront);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      unmark_evicting(*eviction->region, eviction->pages);
      eviction->error = std::current_exception();
      eviction->over = true;
    }
  }
}

void ManagedPager::carry_out(Eviction& eviction) noexcept {
  std::exception_ptr error;
  try {
    drop_marked(*eviction.region, eviction.pages, {});
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    eviction.error = error;
    eviction.over = true;
  }
  changed_->notify_all();
  eviction.held.reset();  // not only when the load that waits forgets it
}

std::size_t ManagedPager::drop(ManagedRegion& region, const std::vector<PageIndex>& wanted) {
  std::vector<PageIndex> pages;   // resident: given back to the budget
  std::vector<PageIndex> strays;  // absent for the ledger, but perhaps read all the same
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : wanted) {
      if (region.table_.pins(page) > 0) continue;
      const PageState state = region.table_.state(page);
      if (state == PageState::kAbsent) strays.push_back(page);
      if (state == PageState::kResident) pages.push_back(page);
    }
    region.strays_ = strays;
    mark_evicting(region, pages);
  }
  return drop_marked(region, pages, strays);
}

std::size_t ManagedPager::drop_marked(ManagedRegion& region, const std::vector<PageIndex>& pages,
                                      const std::vector<PageIndex>& strays) {
  Event start;
  Event end;
  try {
    std::vector<Event> work;
    {
      const std::lock_guard lock(mutex_);
      for (const PageIndex page : pages) {
        const auto& events = region.events_[page];
        if (events.ready) push_unique(work, events.ready);
        for (const auto& reader : events.readers) push_unique(work, reader.second);
      }
    }
    for (const auto& event : work) wait_until_over(*device_, event);
    std::vector<PageIndex> all;
    std::merge(pages.begin(), pages.end(), strays.begin(), strays.end(), std::back_inserter(all));
    if (region.trace_) start = record(evict_stream_);
    issue_evict(region, all, evict_stream_);
    if (start) end = record(evict_stream_);
    device_->stream_synchronize(evict_stream_.get());
  } catch (...) {
    const std::exception_ptr cause = std::current_exception();
    settle(evict_stream_);  // what it was given must not outlive the region
    {
      const std::lock_guard lock(mutex_);
      unmark_evicting(region, pages);
      region.strays_.clear();
    }
    changed_->notify_all();
    std::rethrow_exception(cause);
  }
  const std::size_t nbytes = bytes_of(region, pages);
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      region.table_.finish_evict(page);
      region.events_[page] = {};
    }
    evicting_bytes_ -= nbytes;
    region.strays_.clear();
    budget_->release(Tag::kWeights, nbytes);  // at once with the states: waiters look at both
    stats_.evicted_bytes += nbytes;
    if (start) {
      for_each_run(pages, [&](PageIndex first, std::size_t count) {
        region.notify_evict(first, count, start, end);
      });
    }
  }
  changed_->notify_all();
  return nbytes;
}

void ManagedPager::ask_for_room_ahead(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  Hold held;
  StepTime after = 0;
  {
    const std::lock_guard lock(mutex_);
    if (region.table_.kept_count() == 0 || region.room_asked_) return;
    after = time_wanted(region, pages);
    held = hold(region);
    region.room_asked_ = true;
  }
  evict_thread_.submit([this, &region, after, held = std::move(held)] {
    try {
      make_room_ahead(region, after);
    } catch (const std::exception& error) {  // whoever needs the room meets it again
      device_->suppress(error.what());
    }
  });
}

void ManagedPager::make_room_ahead(ManagedRegion& region, StepTime after) {
  std::vector<PageIndex> pages;
  {
    const std::lock_guard lock(mutex_);
    region.room_asked_ = false;
    const Missing next = missing_after(region, after, sizes_of(region).batch);
    const std::size_t there = (budget_->available() + evicting_bytes_) / page_size_;
    if (next.count <= there) return;
    const std::size_t wanted = next.count - there;
    pages = victims_of(region, wanted, next.last_use, Readers::kDone);
    pages.resize(std::min(pages.size(), wanted));
    pages = checked(region, std::move(pages));
    mark_evicting(region, pages);
  }
  if (!pages.empty()) drop_marked(region, pages, {});
}

void ManagedPager::settle(const OwnedStream& stream) noexcept {
  try {
    device_->stream_synchronize(stream.get());
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
}

Event ManagedPager::record(const OwnedStream& stream) {
  const auto event = std::make_shared<OwnedEvent>(device_, Timing::kOn);
  device_->event_record(event->get(), stream.get());
  return event;
}

}  // namespace penstock
