// What the managed pager does on its own thread: loading, making room, dropping.
#include <algorithm>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "error/error.hpp"
#include "pager/managed_pager.hpp"
#include "pager/page_runs.hpp"

namespace penstock {

std::size_t ManagedPager::load(ManagedRegion& region, const std::vector<PageIndex>& wanted,
                               Urgency urgency) {
  std::vector<PageIndex> missing;
  StepTime after = 0;
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : wanted) {
      if (region.table_.state(page) != PageState::kAbsent) continue;
      missing.push_back(page);
      after = std::max(after, region.table_.next_use(page));
    }
    for (const PageIndex page : missing) region.table_.begin_load(page);
  }
  const std::size_t nbytes = bytes_of(region, missing);
  const auto cancel = [&] {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : missing) region.table_.cancel_load(page);
  };
  try {
    if (!make_room(region, nbytes, after, urgency)) {
      cancel();
      const std::lock_guard lock(mutex_);
      if (urgency == Urgency::kDemand) throw refusal(region, nbytes);
      ++stats_.ahead_declined;
      return 0;
    }
  } catch (const CapExceededError&) {
    throw;
  } catch (...) {
    cancel();
    throw;
  }
  ScopedCharge charge(*budget_, Tag::kWeights, nbytes);
  try {
    issue_load(region, missing, urgency);
  } catch (...) {
    cancel();
    throw;
  }
  charge.keep();
  const std::lock_guard lock(mutex_);
  stats_.loaded_bytes += nbytes;
  if (urgency == Urgency::kAhead && nbytes > 0) ++stats_.ahead_loads;
  return nbytes;
}

void ManagedPager::issue_load(ManagedRegion& region, const std::vector<PageIndex>& pages,
                              Urgency urgency) {
  if (pages.empty()) return;
  if (!region.sealed_ && region.access() == Access::kReadMostly) {
    device_->managed_seal(region.address(), region.nbytes());
    region.sealed_ = true;
  }
  const auto ready = std::make_shared<OwnedEvent>(device_, Timing::kOn);
  Event start;
  try {
    if (region.trace_) {
      start = std::make_shared<OwnedEvent>(device_, Timing::kOn);
      device_->event_record(start->get(), load_stream_.get());
    }
    for_each_run(pages, [&](PageIndex first, std::size_t count) {
      device_->managed_prefetch(address_of(region, first), run_bytes(region, first, count),
                                load_stream_.get());
    });
    device_->event_record(ready->get(), load_stream_.get());
  } catch (...) {
    // Some runs may be on their way: take them back before the charge is.
    const std::exception_ptr cause = std::current_exception();
    settle(load_stream_);
    try {
      issue_evict(region, pages);
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    settle(evict_stream_);
    std::rethrow_exception(cause);
  }
  const std::lock_guard lock(mutex_);
  for (const PageIndex page : pages) {
    region.table_.finish_load(page);
    region.table_.touch(page);
    region.events_[page].ready = ready;
  }
  for_each_run(pages, [&](PageIndex first, std::size_t count) {
    region.notify_load(first, count, run_bytes(region, first, count), start, ready,
                       urgency == Urgency::kDemand);
  });
}

void ManagedPager::issue_evict(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  for_each_run(pages, [&](PageIndex first, std::size_t count) {
    device_->managed_evict(address_of(region, first), run_bytes(region, first, count),
                           region.access(), evict_stream_.get());
  });
}

bool ManagedPager::make_room(ManagedRegion& region, std::size_t nbytes, StepTime after,
                             Urgency urgency) {
  for (;;) {
    std::vector<Victims> victims;
    std::vector<Hold> holds;
    {
      std::unique_lock lock(mutex_);
      const std::size_t available = budget_->available();
      if (available >= nbytes) {
        if (budget_->try_charge(Tag::kWeights, nbytes)) return true;
        continue;  // another holder of the budget was faster
      }
      victims = choose_victims(region, nbytes - available, after, urgency);
      if (victims.empty()) {
        if (urgency == Urgency::kAhead || retiring_ == 0) return false;
        // Regions that are going hold a charge, but no page that could be evicted.
        request_done_.wait(lock, [&] { return retiring_ == 0; });
        continue;
      }
      for (const auto& each : victims) holds.push_back(hold(*each.region));
    }
    // This gives back less than expected where pages were pinned meanwhile: hence the loop.
    for (const auto& each : victims) drop(*each.region, each.pages);
  }
}

std::size_t ManagedPager::drop(ManagedRegion& region, const std::vector<PageIndex>& wanted) {
  std::vector<PageIndex> pages;   // resident: given back to the budget
  std::vector<PageIndex> strays;  // absent for the ledger, but perhaps read all the same
  std::vector<Event> loads;
  std::vector<Event> readers;
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : wanted) {
      auto& table = region.table_;
      if (table.pins(page) > 0) continue;
      if (table.state(page) == PageState::kAbsent) strays.push_back(page);
      if (table.state(page) != PageState::kResident) continue;
      table.begin_evict(page);
      pages.push_back(page);
      if (const auto& ready = region.events_[page].ready) push_unique(loads, ready);
      for (const auto& reader : region.events_[page].readers) push_unique(readers, reader.second);
    }
  }
  try {
    for (const auto& load_event : loads) wait_until_over(*load_event);
    for (const auto& reader : readers) wait_until_over(*reader);
    std::vector<PageIndex> all;
    std::merge(pages.begin(), pages.end(), strays.begin(), strays.end(), std::back_inserter(all));
    issue_evict(region, all);
    device_->stream_synchronize(evict_stream_.get());
  } catch (...) {
    const std::exception_ptr cause = std::current_exception();
    settle(evict_stream_);  // what it was given must not outlive the region
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) region.table_.cancel_evict(page);
    std::rethrow_exception(cause);
  }
  const std::size_t nbytes = bytes_of(region, pages);
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      region.table_.finish_evict(page);
      region.events_[page] = {};
    }
    stats_.evicted_bytes += nbytes;
    for_each_run(pages,
                 [&](PageIndex first, std::size_t count) { region.notify_evict(first, count); });
  }
  budget_->release(Tag::kWeights, nbytes);
  return nbytes;
}

void ManagedPager::settle(const OwnedStream& stream) noexcept {
  try {
    device_->stream_synchronize(stream.get());
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
}

void ManagedPager::wait_until_over(OwnedEvent& event) {
  try {
    device_->event_synchronize(event.get());
  } catch (const DeviceError& error) {
    // Work that failed reads and writes nothing any more; only a wait that failed is an error.
    if (!device_->event_done(event.get())) throw;
    device_->suppress(error.what());
  }
}

}  // namespace penstock
