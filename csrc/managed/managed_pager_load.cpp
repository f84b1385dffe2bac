// What the managed pager does on its load thread: finding room, loading.
#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "error/error.hpp"
#include "managed/managed_pager.hpp"
#include "managed/region_pages.hpp"
#include "schedule/page_lists.hpp"

namespace penstock {

void ManagedPager::run_demands() {
  for (;;) {
    std::shared_ptr<Request> request;
    {
      const std::lock_guard lock(mutex_);
      if (demands_.empty()) return;
      request = std::move(demands_.front());
      demands_.pop_front();
    }
    (*request)();
  }
}

std::size_t ManagedPager::load(ManagedRegion& region, const std::vector<PageIndex>& wanted,
                               Urgency urgency) {
  const auto missing = take_room(region, wanted, urgency);
  if (!missing) {
    const std::lock_guard lock(mutex_);
    ++stats_.ahead_declined;
    return 0;
  }
  const std::size_t nbytes = bytes_of(region, *missing);
  ScopedCharge charge(*budget_, Tag::kWeights, nbytes);
  try {
    if (urgency == Urgency::kAhead && nbytes > 0) ask_for_room_ahead(region, *missing);
    issue_load(region, *missing, urgency);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : *missing) region.table_.cancel_load(page);
    throw;
  }
  charge.keep();
  const std::lock_guard lock(mutex_);
  stats_.loaded_bytes += nbytes;
  if (urgency == Urgency::kAhead && nbytes > 0) ++stats_.ahead_loads;
  return nbytes;
}

std::optional<std::vector<PageIndex>> ManagedPager::take_room(ManagedRegion& region,
                                                              const std::vector<PageIndex>& wanted,
                                                              Urgency urgency) {
  std::vector<std::shared_ptr<Eviction>> begun;
  std::unique_lock lock(mutex_);
  for (;;) {
    if (urgency == Urgency::kAhead && !demands_.empty()) {
      lock.unlock();
      run_demands();
      lock.lock();
      continue;
    }
    bool under_way = false;  // of what this load has begun
    for (const auto& eviction : begun) {
      if (eviction->error) std::rethrow_exception(eviction->error);
      under_way = under_way || !eviction->over;
    }
    if (dropping(region, wanted)) {
      changed_->wait(lock);
      continue;
    }
    std::vector<PageIndex> missing;
    std::copy_if(wanted.begin(), wanted.end(), std::back_inserter(missing),
                 [&](PageIndex page) { return region.table_.state(page) == PageState::kAbsent; });
    const std::size_t nbytes = bytes_of(region, missing);
    const std::size_t available = budget_->available();
    if (available >= nbytes) {
      if (!budget_->try_charge(Tag::kWeights, nbytes)) continue;  // another holder was faster
      for (const PageIndex page : missing) region.table_.begin_load(page);
      return missing;
    }
    const std::size_t lacking = nbytes - available;
    if (under_way || evicting_bytes_ >= lacking) {
      changed_->wait(lock);
      continue;
    }
    // Evictions give back less than expected where others charge meanwhile: hence the loop.
    const StepTime after = urgency == Urgency::kAhead ? time_wanted(region, missing) : 0;
    const auto victims = choose_victims(region, lacking - evicting_bytes_, after, urgency);
    if (!victims.empty()) {
      std::vector<std::shared_ptr<Eviction>> evictions;
      for (const auto& each : victims) {
        auto eviction = std::make_shared<Eviction>();
        eviction->region = each.region;
        eviction->pages = each.pages;
        eviction->held = hold(*each.region);
        evictions.push_back(std::move(eviction));
      }
      for (const auto& each : evictions) mark_evicting(*each->region, each->pages);
      begun.insert(begun.end(), evictions.begin(), evictions.end());
      lock.unlock();
      begin_evictions(evictions);
      lock.lock();
      continue;
    }
    if (urgency == Urgency::kAhead) return std::nullopt;
    // Regions that are going hold a charge, but no page that could be evicted.
    if (evicting_bytes_ == 0 && retiring_ == 0) throw refusal(region, nbytes);
    changed_->wait(lock);
  }
}

bool ManagedPager::dropping(const ManagedRegion& region,
                            const std::vector<PageIndex>& pages) const {
  return std::any_of(pages.begin(), pages.end(), [&](PageIndex page) {
    return region.table_.state(page) == PageState::kEvicting ||
           std::binary_search(region.strays_.begin(), region.strays_.end(), page);
  });
}

void ManagedPager::issue_load(ManagedRegion& region, const std::vector<PageIndex>& pages,
                              Urgency urgency) {
  if (pages.empty()) return;
  if (!region.sealed_ && region.access() == Access::kReadMostly) {
    device_->managed_seal(region.address(), region.nbytes());
    region.sealed_ = true;
  }
  const OwnedStream& stream = load_streams_.at(next_load_++ % load_streams_.size());
  Event start;
  Event ready;
  try {
    if (region.trace_) start = record(stream);
    for_each_run(pages, [&](PageIndex first, std::size_t count) {
      device_->managed_prefetch(address_of(region, first), run_bytes(region, first, count),
                                stream.get());
    });
    ready = record(stream);
  } catch (...) {
    // Some runs may be on their way: take them back before the charge is.
    const std::exception_ptr cause = std::current_exception();
    settle(stream);
    try {
      issue_evict(region, pages, stream);
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    settle(stream);
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

}  // namespace penstock
