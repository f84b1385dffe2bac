// The managed pager decides which pages of its regions are resident, under the cap of a budget. A
// page is charged before the device is asked to bring it in and released after the device has
// dropped it, so the ledger is never below what the pager holds.
//
// Using pages: `begin` pins them, sees to it that they are resident and orders the caller's stream
// after their loads; `end` records that the stream's work so far was the last to read them, and
// unpins. Between the two they cannot be evicted. `prefetch_ahead` asks for pages of later steps
// and never waits: it takes free room, pages of idle regions, and pages of its own region whose
// next use is later than the use it prefetches for; otherwise it does nothing, and `begin` loads
// them then.
//
// Threads: all functions are thread-safe. Loading and evicting happen on one thread of the pager's
// own (the calls block for a good part of the transfer), in two streams, one for each direction;
// page states change only there. Streams: a caller's stream is never blocked but by waiting for the
// loads it needs; before a page is dropped, the pager's thread waits for its last readers.
//
// Errors: a failed load or eviction leaves pages in the state they had and the ledger balanced. An
// error that a load meets later, on the stream, surfaces in the `begin` that needs the page, which
// then drops the page again.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "budget/budget.hpp"
#include "device/handles.hpp"
#include "error/error.hpp"
#include "pager/managed_region.hpp"
#include "threading/task_thread.hpp"

namespace penstock {

/// What the pager has done since it was made. Bytes are counted by pages.
struct PagerStats {
  std::uint64_t loaded_bytes = 0;
  std::uint64_t evicted_bytes = 0;
  std::uint64_t hits = 0;  ///< Calls of `begin` that found all their pages loaded or under way.
  std::uint64_t demand_loads = 0;    ///< Calls of `begin` that had to load.
  std::uint64_t ahead_loads = 0;     ///< Calls of `prefetch_ahead` that loaded.
  std::uint64_t ahead_declined = 0;  ///< Those that found no room worth taking.
  std::uint64_t ahead_failed = 0;    ///< Those that failed; `begin` tries again and reports.
};

class ManagedPager : public std::enable_shared_from_this<ManagedPager> {
 public:
  /// @param page_size  Bytes of a page; a power of two, at least 4096.
  static std::shared_ptr<ManagedPager> create(std::shared_ptr<Device> device,
                                              std::shared_ptr<Budget> budget,
                                              std::size_t page_size);
  ~ManagedPager() = default;
  ManagedPager(const ManagedPager&) = delete;
  ManagedPager& operator=(const ManagedPager&) = delete;

  /// Reserves a region of `nbytes` (at least 1), nothing of it resident.
  std::shared_ptr<ManagedRegion> reserve(std::size_t nbytes, Access access);

  /// Pins `pages`, loads what is missing, and orders `stream` after the loads.
  /// @throws CapExceededError where they do not fit beside what is pinned; nothing is pinned then.
  void begin(ManagedRegion& region, const std::vector<PageIndex>& pages, StreamHandle stream);
  /// Unpins `pages` once the work given to `stream` so far has run.
  void end(ManagedRegion& region, const std::vector<PageIndex>& pages, StreamHandle stream);

  /// As `begin` without pinning. @return bytes newly charged.
  std::size_t prefetch(ManagedRegion& region, const std::vector<PageIndex>& pages,
                       StreamHandle stream);
  /// Asks for pages of a later step; returns at once. Errors surface when the pages are needed.
  void prefetch_ahead(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Drops those of `pages` that are not pinned, also those that the device brought in by itself
  /// because they were read while absent. @return bytes given back to the budget.
  std::size_t evict(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Blocks until the pager's thread has done what was asked so far, and its copies have ended.
  void synchronize();

  /// Whether `begin` would find the pages loaded, and nothing to wait for.
  bool settled(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  void set_schedule(ManagedRegion& region, std::vector<std::vector<PageIndex>> steps);
  /// The next occurrence of `step` begins now.
  void advance(ManagedRegion& region, StepIndex step);
  /// Marks a region as being in use (its pages go after those of idle regions) or idle.
  void set_active(ManagedRegion& region, bool active);

  PagerStats stats() const;
  RegionStats region_stats(const ManagedRegion& region) const;
  Device& device() const noexcept { return *device_; }
  std::size_t page_size() const noexcept { return page_size_; }
  std::size_t cap() const { return budget_->cap(); }

 private:
  friend class ManagedRegion;
  struct Victims {
    ManagedRegion* region;
    std::vector<PageIndex> pages;
  };
  // Keeps a region that the caller does not own from going: retire() waits for it.
  using Hold = std::shared_ptr<void>;
  enum class Urgency : bool { kAhead, kDemand };

  ManagedPager(std::shared_ptr<Device> device, std::shared_ptr<Budget> budget,
               std::size_t page_size);

  // On the caller's thread.
  void require_own(const ManagedRegion& region) const;
  std::vector<PageIndex> own_pages(const ManagedRegion& region,
                                   const std::vector<PageIndex>& pages) const;
  using Work = std::function<std::size_t()>;
  std::future<std::size_t> submit(Work work, TaskThread::Order order = TaskThread::Order::kBack);
  std::future<std::size_t> submit_for(ManagedRegion& region, Work work,
                                      TaskThread::Order order = TaskThread::Order::kBack);
  void pin(ManagedRegion& region, const std::vector<PageIndex>& pages);
  void unpin(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Pins, loads and orders the stream; undoes all of it on an error. @return bytes charged.
  std::size_t pin_and_load(ManagedRegion& region, const std::vector<PageIndex>& pages,
                           StreamHandle stream);
  std::size_t load_pinned(ManagedRegion& region, const std::vector<PageIndex>& pages,
                          StreamHandle stream);
  bool all_present(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  void retire(ManagedRegion& region) noexcept;

  // On the pager's thread.
  std::size_t load(ManagedRegion& region, const std::vector<PageIndex>& pages, Urgency urgency);
  void issue_load(ManagedRegion& region, const std::vector<PageIndex>& pages, Urgency urgency);
  void issue_evict(ManagedRegion& region, const std::vector<PageIndex>& pages);
  bool make_room(ManagedRegion& region, std::size_t nbytes, StepTime after, Urgency urgency);
  std::size_t drop(ManagedRegion& region, const std::vector<PageIndex>& pages);
  void wait_until_over(OwnedEvent& event);
  /// Waits for a stream in which something failed, and takes the error out of it.
  void settle(const OwnedStream& stream) noexcept;

  // With mutex_ held.
  Hold hold(ManagedRegion& region);
  std::vector<Victims> choose_victims(ManagedRegion& wanting, std::size_t nbytes, StepTime after,
                                      Urgency urgency);
  CapExceededError refusal(const ManagedRegion& region, std::size_t nbytes) const;
  void touch(ManagedRegion& region);

  std::shared_ptr<Device> device_;
  std::shared_ptr<Budget> budget_;
  std::size_t page_size_;

  mutable std::mutex mutex_;  // page tables, events and figures of all regions
  std::condition_variable request_done_;
  std::vector<ManagedRegion*> regions_;
  std::size_t retiring_ = 0;  // regions that are no longer in the list, but still charged
  std::uint64_t activity_ = 0;
  PagerStats stats_;

  OwnedStream load_stream_;
  OwnedStream evict_stream_;
  TaskThread thread_{TaskThread::AtEnd::kDrop};  // last: it uses all the others
};

}  // namespace penstock
