#include "pager/managed_pager.hpp"

#include <algorithm>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"

namespace penstock {

namespace {

// Calls `visit(first, count)` for each run of consecutive indices.
template <typename Visit>
void for_each_run(const std::vector<PageIndex>& pages, Visit visit) {
  for (std::size_t i = 0; i < pages.size();) {
    std::size_t n = 1;
    while (i + n < pages.size() && pages[i + n] == pages[i] + n) ++n;
    visit(pages[i], n);
    i += n;
  }
}

std::vector<PageIndex> sorted_unique(std::vector<PageIndex> pages) {
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  return pages;
}

std::size_t bytes_of(const Region& region, const std::vector<PageIndex>& pages) {
  return std::accumulate(
      pages.begin(), pages.end(), std::size_t{0},
      [&](std::size_t sum, PageIndex page) { return sum + region.page_nbytes(page); });
}

std::byte* address_of(const Region& region, PageIndex page) {
  return region.address() + std::size_t{page} * region.page_size();
}

std::size_t run_bytes(const Region& region, PageIndex first, std::size_t count) {
  const auto last = static_cast<PageIndex>(first + count - 1);
  return (count - 1) * region.page_size() + region.page_nbytes(last);
}

template <typename T>
void push_unique(std::vector<T>& items, const T& item) {
  if (std::find(items.begin(), items.end(), item) == items.end()) items.push_back(item);
}

std::size_t wait(std::future<std::size_t> result) {
  try {
    return result.get();
  } catch (const std::future_error&) {
    throw Error("the pager was closed before it came to the request");
  }
}

}  // namespace

std::shared_ptr<ManagedPager> ManagedPager::create(std::shared_ptr<Device> device,
                                                   std::shared_ptr<Budget> budget,
                                                   std::size_t page_size) {
  if (page_size < 4096 || (page_size & (page_size - 1)) != 0) {
    throw std::invalid_argument("page_size " + std::to_string(page_size) +
                                " is not a power of two of at least 4096 bytes");
  }
  const std::string reason = device->info().no_managed_reason;
  if (!reason.empty()) throw DeviceError("managed pager", 0, reason);
  return std::shared_ptr<ManagedPager>(
      new ManagedPager(std::move(device), std::move(budget), page_size));
}

ManagedPager::ManagedPager(std::shared_ptr<Device> device, std::shared_ptr<Budget> budget,
                           std::size_t page_size)
    : device_(std::move(device)),
      budget_(std::move(budget)),
      page_size_(page_size),
      load_stream_(device_),
      evict_stream_(device_) {}

std::shared_ptr<Region> ManagedPager::reserve(std::size_t nbytes, Access access) {
  constexpr std::size_t kMostPages = std::size_t{1} << 31;
  if (nbytes == 0 || nbytes / page_size_ >= kMostPages) {
    throw std::invalid_argument("cannot reserve a region of " + std::to_string(nbytes) + " bytes");
  }
  std::shared_ptr<Region> region(
      new Region(shared_from_this(), device_, nbytes, page_size_, access));
  const std::lock_guard lock(mutex_);
  regions_.push_back(region.get());
  touch(*region);
  return region;
}

void ManagedPager::touch(Region& region) {
  region.last_activity_ = ++activity_;
}

// ---- on the caller's thread
// ----------------------------------------------------------------------

std::future<std::size_t> ManagedPager::submit(Work work, TaskThread::Order order) {
  const auto task = std::make_shared<std::packaged_task<std::size_t()>>(std::move(work));
  thread_.submit([task] { (*task)(); }, order);
  return task->get_future();
}

std::future<std::size_t> ManagedPager::submit_for(Region& region, Work work,
                                                  TaskThread::Order order) {
  {
    const std::lock_guard lock(mutex_);
    ++region.pending_;
  }
  // Ends exactly once, whether the work runs or is dropped: retire() counts on it.
  const std::shared_ptr<void> done(nullptr, [this, &region](void*) {
    {
      const std::lock_guard lock(mutex_);
      --region.pending_;
    }
    request_done_.notify_all();
  });
  return submit([work = std::move(work), done] { return work(); }, order);
}

void ManagedPager::pin(Region& region, const std::vector<PageIndex>& pages) {
  const std::lock_guard lock(mutex_);
  touch(region);
  for (const PageIndex page : pages) {
    region.table_.pin(page);
    region.table_.touch(page);
  }
}

void ManagedPager::unpin(Region& region, const std::vector<PageIndex>& pages) {
  const std::lock_guard lock(mutex_);
  for (const PageIndex page : pages) region.table_.unpin(page);
}

bool ManagedPager::all_present(const Region& region, const std::vector<PageIndex>& pages) const {
  return std::all_of(pages.begin(), pages.end(), [&](PageIndex page) {
    return region.table_.state(page) == PageState::kResident;
  });
}

std::size_t ManagedPager::load_pinned(Region& region, const std::vector<PageIndex>& pages,
                                      StreamHandle stream) {
  bool present = false;
  {
    const std::lock_guard lock(mutex_);
    present = all_present(region, pages);
    ++(present ? stats_.hits : stats_.demand_loads);
  }
  std::size_t charged = 0;
  if (!present) {
    charged = wait(submit_for(
        region, [this, &region, pages] { return load(region, pages, Urgency::kDemand); },
        TaskThread::Order::kFront));
  }
  std::vector<Region::Event> loads;
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      if (const auto& ready = region.events_[page].ready) push_unique(loads, ready);
    }
  }
  for (const auto& ready : loads) device_->event_wait(stream, ready->get());
  return charged;
}

void ManagedPager::begin(Region& region, const std::vector<PageIndex>& wanted,
                         StreamHandle stream) {
  const std::vector<PageIndex> pages = sorted_unique(wanted);
  pin(region, pages);
  try {
    load_pinned(region, pages, stream);
  } catch (const CapExceededError&) {
    unpin(region, pages);
    throw;
  } catch (...) {
    // A load that failed on its stream left pages resident that hold nothing: drop them.
    const std::exception_ptr cause = std::current_exception();
    unpin(region, pages);
    try {
      evict(region, pages);
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    std::rethrow_exception(cause);
  }
}

void ManagedPager::end(Region& region, const std::vector<PageIndex>& wanted, StreamHandle stream) {
  const std::vector<PageIndex> pages = sorted_unique(wanted);
  std::exception_ptr error;
  Region::Event use;
  try {
    use = std::make_shared<OwnedEvent>(device_);
    device_->event_record(use->get(), stream);
  } catch (...) {
    error = std::current_exception();
    use.reset();
  }
  if (error) {  // no event to remember the readers by: wait for them here
    try {
      device_->stream_synchronize(stream);
    } catch (...) {  // `error` tells of the same device
    }
  }
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      auto& readers = region.events_.at(page).readers;
      const auto same = std::find_if(readers.begin(), readers.end(), [&](const auto& reader) {
        return reader.first == stream.value;
      });
      if (same != readers.end()) readers.erase(same);
      if (use) readers.emplace_back(stream.value, use);
      region.table_.unpin(page);
    }
  }
  if (error) std::rethrow_exception(error);
}

std::size_t ManagedPager::prefetch(Region& region, const std::vector<PageIndex>& wanted,
                                   StreamHandle stream) {
  const std::vector<PageIndex> pages = sorted_unique(wanted);
  pin(region, pages);
  std::size_t charged = 0;
  try {
    charged = load_pinned(region, pages, stream);
  } catch (...) {
    unpin(region, pages);
    throw;
  }
  unpin(region, pages);
  return charged;
}

void ManagedPager::prefetch_ahead(Region& region, const std::vector<PageIndex>& wanted) {
  const std::vector<PageIndex> pages = sorted_unique(wanted);
  {
    const std::lock_guard lock(mutex_);
    if (all_present(region, pages)) return;
  }
  static_cast<void>(submit_for(region, [this, &region, pages] {
    try {
      return load(region, pages, Urgency::kAhead);
    } catch (...) {  // nobody waits for this request; `begin` meets the error again
      const std::lock_guard lock(mutex_);
      ++stats_.ahead_failed;
      return std::size_t{0};
    }
  }));
}

std::size_t ManagedPager::evict(Region& region, const std::vector<PageIndex>& wanted) {
  const std::vector<PageIndex> pages = sorted_unique(wanted);
  return wait(submit_for(region, [this, &region, pages] { return drop(region, pages); }));
}

void ManagedPager::synchronize() {
  wait(submit([this] {
    device_->stream_synchronize(load_stream_.get());
    device_->stream_synchronize(evict_stream_.get());
    return std::size_t{0};
  }));
}

void ManagedPager::set_schedule(Region& region, std::vector<std::vector<PageIndex>> steps) {
  const std::lock_guard lock(mutex_);
  region.table_.set_schedule(std::move(steps));
}

void ManagedPager::advance(Region& region, StepIndex step) {
  const std::lock_guard lock(mutex_);
  region.table_.advance(step);
}

void ManagedPager::set_active(Region& region, bool active) {
  const std::lock_guard lock(mutex_);
  region.active_ = active;
  touch(region);
}

PagerStats ManagedPager::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

RegionStats ManagedPager::region_stats(const Region& region) const {
  const std::lock_guard lock(mutex_);
  RegionStats stats;
  for (std::size_t i = 0; i < region.page_count(); ++i) {
    const auto page = static_cast<PageIndex>(i);
    if (region.table_.pins(page) > 0) ++stats.pinned_pages;
    if (region.table_.state(page) == PageState::kAbsent) continue;
    ++stats.resident_pages;
    stats.resident_bytes += region.page_nbytes(page);
  }
  return stats;
}

void ManagedPager::retire(Region& region) noexcept {
  if (!thread_.in_owner_process()) return;  // a forked child: the memory is the parent's
  std::size_t charged = 0;
  std::vector<Region::Event> work;
  try {
    std::unique_lock lock(mutex_);
    request_done_.wait(lock, [&] { return region.pending_ == 0; });
    regions_.erase(std::remove(regions_.begin(), regions_.end(), &region), regions_.end());
    for (std::size_t i = 0; i < region.page_count(); ++i) {
      const auto page = static_cast<PageIndex>(i);
      if (region.table_.state(page) == PageState::kAbsent) continue;
      charged += region.page_nbytes(page);
      if (const auto& ready = region.events_[page].ready) push_unique(work, ready);
    }
    for (const auto& events : region.events_) {
      for (const auto& reader : events.readers) push_unique(work, reader.second);
    }
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
  for (const auto& event : work) {
    try {
      device_->event_synchronize(event->get());
    } catch (const std::exception& error) {
      device_->suppress(error.what());
    }
  }
  region.memory_.reset();
  budget_->release(Tag::kWeights, charged);
}

// ---- on the pager's thread
// -----------------------------------------------------------------------

std::size_t ManagedPager::load(Region& region, const std::vector<PageIndex>& wanted,
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
    issue_load(region, missing);
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

void ManagedPager::issue_load(Region& region, const std::vector<PageIndex>& pages) {
  if (pages.empty()) return;
  if (!region.sealed_ && region.access() == Access::kReadMostly) {
    device_->managed_seal(region.address(), region.nbytes());
    region.sealed_ = true;
  }
  const auto ready = std::make_shared<OwnedEvent>(device_);
  try {
    for_each_run(pages, [&](PageIndex first, std::size_t count) {
      device_->managed_prefetch(address_of(region, first), run_bytes(region, first, count),
                                load_stream_.get());
    });
    device_->event_record(ready->get(), load_stream_.get());
  } catch (...) {
    // Some runs may be on their way: take them back before the charge is.
    const std::exception_ptr cause = std::current_exception();
    try {
      device_->stream_synchronize(load_stream_.get());
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    try {
      for_each_run(pages, [&](PageIndex first, std::size_t count) {
        device_->managed_evict(address_of(region, first), run_bytes(region, first, count),
                               region.access(), evict_stream_.get());
      });
      device_->stream_synchronize(evict_stream_.get());
    } catch (const std::exception& second) {
      device_->suppress(second.what());
    }
    std::rethrow_exception(cause);
  }
  const std::lock_guard lock(mutex_);
  for (const PageIndex page : pages) {
    region.table_.finish_load(page);
    region.table_.touch(page);
    region.events_[page].ready = ready;
  }
}

bool ManagedPager::make_room(Region& region, std::size_t nbytes, StepTime after, Urgency urgency) {
  for (;;) {
    const std::size_t available = budget_->available();
    if (available >= nbytes) {
      if (budget_->try_charge(Tag::kWeights, nbytes)) return true;
      continue;  // another holder of the budget was faster
    }
    Victims victims{};
    {
      const std::lock_guard lock(mutex_);
      victims = choose_victims(region, nbytes - available, after, urgency);
    }
    if (victims.pages.empty()) return false;
    drop(*victims.region, victims.pages);  // less than asked for where pages were pinned meanwhile
  }
}

std::size_t ManagedPager::drop(Region& region, const std::vector<PageIndex>& wanted) {
  std::vector<PageIndex> pages;
  std::vector<Region::Event> loads;
  std::vector<Region::Event> readers;
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : wanted) {
      auto& table = region.table_;
      if (table.state(page) != PageState::kResident || table.pins(page) > 0) continue;
      table.begin_evict(page);
      pages.push_back(page);
      if (const auto& ready = region.events_[page].ready) push_unique(loads, ready);
      for (const auto& reader : region.events_[page].readers) push_unique(readers, reader.second);
    }
  }
  try {
    for (const auto& load_event : loads) {
      try {
        device_->event_synchronize(load_event->get());
      } catch (const DeviceError&) {  // a page whose load failed is dropped like any other
      }
    }
    for (const auto& reader : readers) device_->event_synchronize(reader->get());
    for_each_run(pages, [&](PageIndex first, std::size_t count) {
      device_->managed_evict(address_of(region, first), run_bytes(region, first, count),
                             region.access(), evict_stream_.get());
    });
    device_->stream_synchronize(evict_stream_.get());
  } catch (...) {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) region.table_.cancel_evict(page);
    throw;
  }
  const std::size_t nbytes = bytes_of(region, pages);
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      region.table_.finish_evict(page);
      region.events_[page] = {};
    }
    stats_.evicted_bytes += nbytes;
  }
  budget_->release(Tag::kWeights, nbytes);
  return nbytes;
}

// ---- with mutex_ held
// ----------------------------------------------------------------------------

ManagedPager::Victims ManagedPager::choose_victims(Region& wanting, std::size_t nbytes,
                                                   StepTime after, Urgency urgency) {
  std::vector<Region*> order = regions_;
  std::sort(order.begin(), order.end(),
            [](const Region* a, const Region* b) { return a->last_activity_ < b->last_activity_; });
  // Idle regions first, then the wanting one, then what others are using.
  const auto rank = [&](const Region* region) {
    if (region == &wanting) return 1;
    return region->active_ ? 2 : 0;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](const Region* a, const Region* b) { return rank(a) < rank(b); });
  const std::size_t limit = (nbytes + page_size_ - 1) / page_size_;
  for (Region* region : order) {
    if (urgency == Urgency::kAhead && rank(region) == 2) break;
    const StepTime later_than =
        urgency == Urgency::kAhead && region == &wanting ? after : StepTime{0};
    auto pages = region->table_.victims(limit, later_than);
    if (!pages.empty()) return {region, sorted_unique(std::move(pages))};
  }
  return {&wanting, {}};
}

CapExceededError ManagedPager::refusal(const Region& region, std::size_t nbytes) const {
  const BudgetStats ledger = budget_->stats();
  std::size_t pinned = 0;
  for (const Region* each : regions_) {
    for (std::size_t i = 0; i < each->page_count(); ++i) {
      const auto page = static_cast<PageIndex>(i);
      if (each->table_.state(page) == PageState::kResident && each->table_.pins(page) > 0) {
        pinned += each->page_nbytes(page);
      }
    }
  }
  return {"cannot bring in " + format_bytes(nbytes) + " of a region of " +
              format_bytes(region.nbytes()) + ": the cap is " + format_bytes(ledger.cap) + ", " +
              format_bytes(ledger.used) + " are in use and " + format_bytes(pinned) +
              " of them are being read now. Raise the cap to at least " +
              format_bytes(ledger.used + nbytes) + ", or use less at once.",
          nbytes, ledger.cap, ledger.used};
}

}  // namespace penstock
