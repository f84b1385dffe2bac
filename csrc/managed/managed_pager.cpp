#include "managed/managed_pager.hpp"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

#include "error/error.hpp"
#include "managed/region_pages.hpp"
#include "schedule/page_lists.hpp"

namespace penstock {

namespace {

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
      load_streams_{OwnedStream(device_), OwnedStream(device_)},
      evict_stream_(device_) {}

ManagedPager::~ManagedPager() {
  // In a forked child a thread may have waited there that is no more.
  if (!load_thread_.in_owner_process()) static_cast<void>(changed_.release());
}

std::shared_ptr<ManagedRegion> ManagedPager::reserve(std::size_t nbytes, Access access) {
  constexpr std::size_t kMostPages = std::size_t{1} << 31;
  if (nbytes == 0 || nbytes / page_size_ >= kMostPages) {
    throw std::invalid_argument("cannot reserve a region of " + std::to_string(nbytes) + " bytes");
  }
  std::shared_ptr<ManagedRegion> region(
      new ManagedRegion(shared_from_this(), device_, nbytes, page_size_, access));
  const std::lock_guard lock(mutex_);
  regions_.push_back(region.get());
  touch(*region);
  return region;
}

void ManagedPager::require_own(const ManagedRegion& region) const {
  if (region.pager_.get() != this) throw std::invalid_argument("the region is another pager's");
}

std::vector<PageIndex> ManagedPager::own_pages(const ManagedRegion& region,
                                               const std::vector<PageIndex>& pages) const {
  require_own(region);
  return checked(region, pages);
}

void ManagedPager::touch(ManagedRegion& region) {
  region.last_activity_ = ++activity_;
}

ManagedPager::Hold ManagedPager::hold(ManagedRegion& region, std::vector<PageIndex> asked) {
  Hold held(nullptr, [this, &region, asked](void*) {
    {
      const std::lock_guard lock(mutex_);
      --region.pending_;
      for (const PageIndex page : asked) --region.asked_[page];
    }
    changed_->notify_all();
  });
  ++region.pending_;
  for (const PageIndex page : asked) ++region.asked_[page];
  return held;
}

std::size_t ManagedPager::demand(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  load_thread_.require_owner_process();
  const auto request = std::make_shared<Request>(
      [this, &region, pages] { return load(region, pages, Urgency::kDemand); });
  {
    const std::lock_guard lock(mutex_);
    demands_.push_back(request);
  }
  changed_->notify_all();  // a load ahead that waits makes way
  try {
    load_thread_.submit([this] { run_demands(); }, TaskThread::Order::kFront);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    const auto mine = std::find(demands_.begin(), demands_.end(), request);
    if (mine != demands_.end()) {
      demands_.erase(mine);
      throw;
    }  // else a load ahead has taken it on already
  }
  return wait(request->get_future());
}

void ManagedPager::pin(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  const std::lock_guard lock(mutex_);
  touch(region);
  for (const PageIndex page : pages) {
    region.table_.pin(page);
    region.table_.touch(page);
  }
}

void ManagedPager::unpin(ManagedRegion& region, const std::vector<PageIndex>& pages) {
  const std::lock_guard lock(mutex_);
  for (const PageIndex page : pages) region.table_.unpin(page);
}

bool ManagedPager::all_present(const ManagedRegion& region,
                               const std::vector<PageIndex>& pages) const {
  return std::all_of(pages.begin(), pages.end(), [&](PageIndex page) {
    return region.table_.state(page) == PageState::kResident;
  });
}

bool ManagedPager::wait_for_ahead(std::unique_lock<std::mutex>& lock, const ManagedRegion& region,
                                  const std::vector<PageIndex>& pages) {
  if (all_present(region, pages)) return true;
  if (!load_thread_.in_owner_process()) return false;  // who was asked is no more
  changed_->wait(lock, [&] {
    return std::all_of(pages.begin(), pages.end(), [&](PageIndex page) {
      return region.asked_[page] == 0 || region.table_.state(page) == PageState::kResident;
    });
  });
  return all_present(region, pages);
}

std::size_t ManagedPager::load_pinned(ManagedRegion& region, const std::vector<PageIndex>& pages,
                                      StreamHandle stream) {
  bool present = false;
  {
    std::unique_lock lock(mutex_);
    present = wait_for_ahead(lock, region, pages);
    ++(present ? stats_.hits : stats_.demand_loads);
  }
  const std::size_t charged = present ? 0 : demand(region, pages);
  std::vector<Event> loads;
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      if (const auto& ready = region.events_[page].ready) push_unique(loads, ready);
    }
  }
  for (const auto& ready : loads) device_->event_wait(stream, ready->get());
  return charged;
}

std::size_t ManagedPager::pin_and_load(ManagedRegion& region, const std::vector<PageIndex>& pages,
                                       StreamHandle stream) {
  pin(region, pages);
  try {
    return load_pinned(region, pages, stream);
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

void ManagedPager::begin(ManagedRegion& region, const std::vector<PageIndex>& wanted,
                         StreamHandle stream) {
  pin_and_load(region, own_pages(region, wanted), stream);
}

void ManagedPager::end(ManagedRegion& region, const std::vector<PageIndex>& wanted,
                       StreamHandle stream) {
  const std::vector<PageIndex> pages = own_pages(region, wanted);
  {
    const std::lock_guard lock(mutex_);
    for (const PageIndex page : pages) {
      if (region.table_.pins(page) > 0) continue;
      throw ScheduleError("end: page " + std::to_string(page) + " was not begun");
    }
  }
  std::exception_ptr error;
  Event use;
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

std::size_t ManagedPager::prefetch(ManagedRegion& region, const std::vector<PageIndex>& wanted,
                                   StreamHandle stream) {
  const std::vector<PageIndex> pages = own_pages(region, wanted);
  const std::size_t charged = pin_and_load(region, pages, stream);
  unpin(region, pages);
  return charged;
}

void ManagedPager::prefetch_ahead(ManagedRegion& region, const std::vector<PageIndex>& wanted) {
  const std::vector<PageIndex> pages = own_pages(region, wanted);
  load_thread_.require_owner_process();
  Hold held;
  {
    const std::lock_guard lock(mutex_);
    if (all_present(region, pages)) return;
    held = hold(region, pages);
  }
  load_thread_.submit([this, &region, pages, held] {
    try {
      load(region, pages, Urgency::kAhead);
    } catch (...) {  // nobody waits for this request; `begin` meets the error again
      const std::lock_guard lock(mutex_);
      ++stats_.ahead_failed;
    }
  });
}

std::size_t ManagedPager::evict(ManagedRegion& region, const std::vector<PageIndex>& wanted) {
  const std::vector<PageIndex> pages = own_pages(region, wanted);
  load_thread_.require_owner_process();
  auto request = std::make_shared<Request>([this, &region, pages] { return drop(region, pages); });
  std::future<std::size_t> result = request->get_future();
  Hold held;
  {
    const std::lock_guard lock(mutex_);
    held = hold(region);
  }
  // Through the load thread, so that it comes after what was asked for before.
  load_thread_.submit([this, request = std::move(request), held = std::move(held)] {
    try {
      evict_thread_.submit([request, held] { (*request)(); });
    } catch (const std::exception& error) {  // the caller learns that the request was dropped
      device_->suppress(error.what());
    }
  });
  return wait(std::move(result));
}

void ManagedPager::synchronize() {
  const auto wait_for = [this](TaskThread& thread, const OwnedStream& stream) {
    auto request = std::make_shared<Request>([this, &stream] {
      device_->stream_synchronize(stream.get());
      return std::size_t{0};
    });
    std::future<std::size_t> result = request->get_future();
    thread.submit([request = std::move(request)] { (*request)(); });
    wait(std::move(result));
  };
  for (const auto& stream : load_streams_) wait_for(load_thread_, stream);
  wait_for(evict_thread_, evict_stream_);  // after the loads, which may have others evicted
}

bool ManagedPager::settled(const ManagedRegion& region, const std::vector<PageIndex>& pages) const {
  const std::vector<PageIndex> own = own_pages(region, pages);
  const std::lock_guard lock(mutex_);
  return all_present(region, own) && std::all_of(own.begin(), own.end(), [&](PageIndex page) {
           const Event& ready = region.events_[page].ready;
           return !ready || device_->event_done(ready->get());
         });
}

void ManagedPager::set_schedule(ManagedRegion& region, std::vector<std::vector<PageIndex>> steps) {
  require_own(region);
  const std::lock_guard lock(mutex_);
  region.table_.set_schedule(std::move(steps));
}

void ManagedPager::advance(ManagedRegion& region, StepIndex step) {
  require_own(region);
  const std::lock_guard lock(mutex_);
  region.table_.advance(step);
}

void ManagedPager::set_active(ManagedRegion& region, bool active) {
  require_own(region);
  const std::lock_guard lock(mutex_);
  region.active_ = active;
  touch(region);
}

void ManagedPager::set_turn(ManagedRegion& region, std::optional<std::uint32_t> turn) {
  require_own(region);
  const std::lock_guard lock(mutex_);
  region.turn_ = turn;
}

void ManagedPager::keep(ManagedRegion& region, const std::vector<PageIndex>& wanted) {
  const std::vector<PageIndex> pages = own_pages(region, wanted);
  const std::lock_guard lock(mutex_);
  region.table_.keep(pages);
}

std::vector<bool> ManagedPager::staying(const ManagedRegion& region) const {
  const std::lock_guard lock(mutex_);
  const PageTable& table = region.table_;
  if (table.kept_count() == 0) return {};
  std::vector<bool> staying(region.page_count());
  for (std::size_t i = 0; i < staying.size(); ++i) {
    const auto page = static_cast<PageIndex>(i);
    staying[i] = table.kept(page) && table.state(page) == PageState::kResident;
  }
  return staying;
}

AheadSizes ManagedPager::ahead_sizes(const ManagedRegion& region) const {
  const std::lock_guard lock(mutex_);
  return sizes_of(region);
}

PagerStats ManagedPager::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

RegionStats ManagedPager::region_stats(const ManagedRegion& region) const {
  require_own(region);
  const std::lock_guard lock(mutex_);
  RegionStats stats;
  for (std::size_t i = 0; i < region.page_count(); ++i) {
    const auto page = static_cast<PageIndex>(i);
    if (region.table_.pins(page) > 0) ++stats.pinned_pages;
    const PageState state = region.table_.state(page);
    if (state != PageState::kResident && state != PageState::kEvicting) continue;
    ++stats.resident_pages;
    stats.resident_bytes += region.page_nbytes(page);
  }
  stats.in_place_bytes = stats.resident_bytes;
  return stats;
}

void ManagedPager::retire(ManagedRegion& region) noexcept {
  if (!load_thread_.in_owner_process()) return;  // a forked child: the memory is the parent's
  std::size_t charged = 0;
  std::vector<Event> work;
  try {
    std::unique_lock lock(mutex_);
    changed_->wait(lock, [&] { return region.pending_ == 0; });
    regions_.erase(std::remove(regions_.begin(), regions_.end(), &region), regions_.end());
    ++retiring_;
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
  settle(evict_stream_);  // it has work of this region only where a wait for it failed
  region.memory_.reset();
  budget_->release(Tag::kWeights, charged);
  {
    const std::lock_guard lock(mutex_);
    --retiring_;
  }
  changed_->notify_all();
}

}  // namespace penstock
