// The managed pager decides which pages of its regions are resident, under the cap of a budget. A
// page is charged before the device is asked to bring it in and released after the device has
// dropped it, so the ledger is never below what the pager holds.
//
// Using pages: `begin` pins them, sees to it that they are resident and orders the caller's stream
// after their loads; `end` records that the stream's work so far was the last to read them, and
// unpins. Between the two they cannot be evicted. `prefetch_ahead` asks for pages of later steps
// and never waits: it takes free room, pages of idle regions, and pages of its own region whose
// next use is later than the use it prefetches for; otherwise it does nothing, and `begin` loads
// them then. `begin` waits for pages that were asked for ahead, rather than asking again.
//
// A plan says by `keep` which pages of a region are to stay; the others pass through, and go in the
// order in which they were used, those first that nobody reads any more. Look-ahead never takes a
// kept page of its own region. Where pages pass through, room for the next batch is made as soon as
// one is loaded, of pages whose readers are done.
//
// Threads: all functions are thread-safe. Loading happens on one thread of the pager's own,
// evicting on another (the calls block for a good part of the transfer, or do all the work), each
// with a stream. The load thread alone turns absent pages into loading and these into resident
// ones. Resident pages become evicting, under the lock, on the thread that wants the room or was
// asked to evict; the evict thread alone ends that. Who needs a page that is being evicted waits
// for the end of it and loads again; who needs room waits for evictions under way where they will
// do, and has others begun for the rest. A load ahead that waits lets demands go first. The evict
// thread never waits for the load thread. Streams: a caller's stream is never blocked but by
// waiting for the loads it needs; before a page is dropped, the evict thread waits for its last
// readers.
//
// Errors: a failed load or eviction leaves pages in the state they had and the ledger balanced. An
// error that a load meets later, on the stream, surfaces in the `begin` that needs the page, which
// then drops the page again.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "budget/budget.hpp"
#include "device/handles.hpp"
#include "error/error.hpp"
#include "managed/managed_region.hpp"
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

/// Look-ahead of one region, in pages.
struct AheadSizes {
  std::size_t batch;   ///< To load at once.
  std::size_t window;  ///< Batches are asked for while fewer than this are ahead.
};

class ManagedPager : public std::enable_shared_from_this<ManagedPager> {
 public:
  /// Bytes that are loaded at once, at most. Two at a time move 0.88 of the link's rate or more;
  /// one at a time 0.71 to 0.89, 0.91 in GiB, which need as much room, a third by pages.
  static constexpr std::size_t kLargestBatch = std::size_t{128} << 20;
  /// Batches in the room that pages pass through: two on their way, one that is read, one that is
  /// evicted.
  static constexpr std::size_t kBatchesInRing = 4;

  /// @param page_size  Bytes of a page; a power of two, at least 4096.
  static std::shared_ptr<ManagedPager> create(std::shared_ptr<Device> device,
                                              std::shared_ptr<Budget> budget,
                                              std::size_t page_size);
  ~ManagedPager();
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
  /// because they were read while absent, once what was asked for before is loaded. @return bytes
  /// given back to the budget; those of pages that are being evicted already do not count.
  std::size_t evict(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Blocks until the pager's threads have done what was asked so far, and their copies have ended.
  void synchronize();

  /// Whether `begin` would find the pages loaded, and nothing to wait for.
  bool settled(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  void set_schedule(ManagedRegion& region, std::vector<std::vector<PageIndex>> steps);
  /// The next occurrence of `step` begins now.
  void advance(ManagedRegion& region, StepIndex step);
  /// Marks a region as being in use (its pages go after those of idle regions) or idle.
  void set_active(ManagedRegion& region, bool active);
  /// Says when others take a region's pages, among regions that are as much in use: lower turns
  /// first, then the least recently used; no turn: never. Every region begins with turn 0.
  void set_turn(ManagedRegion& region, std::optional<std::uint32_t> turn);
  /// Replaces the pages that a plan wants resident; the others pass through. None: no plan.
  void keep(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Pages, by index, that a plan wants resident and that are; empty where there is no plan.
  std::vector<bool> staying(const ManagedRegion& region) const;
  /// How many pages to ask for ahead at once, and how many may be ahead.
  AheadSizes ahead_sizes(const ManagedRegion& region) const;

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
  // Pages of one region that were marked as evicting on the load thread.
  struct Eviction {
    ManagedRegion* region = nullptr;
    std::vector<PageIndex> pages;
    Hold held;
    bool over = false;  // these two with mutex_ held
    std::exception_ptr error;
  };
  enum class Urgency : bool { kAhead, kDemand };
  enum class Readers : bool { kDone, kAny };

  ManagedPager(std::shared_ptr<Device> device, std::shared_ptr<Budget> budget,
               std::size_t page_size);

  // On the caller's thread.
  void require_own(const ManagedRegion& region) const;
  std::vector<PageIndex> own_pages(const ManagedRegion& region,
                                   const std::vector<PageIndex>& pages) const;
  using Request = std::packaged_task<std::size_t()>;
  std::size_t demand(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Waits for what was asked for ahead. With the lock. @return whether all pages are present.
  bool wait_for_ahead(std::unique_lock<std::mutex>& lock, const ManagedRegion& region,
                      const std::vector<PageIndex>& pages);
  void pin(ManagedRegion& region, const std::vector<PageIndex>& pages);
  void unpin(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Pins, loads and orders the stream; undoes all of it on an error. @return bytes charged.
  std::size_t pin_and_load(ManagedRegion& region, const std::vector<PageIndex>& pages,
                           StreamHandle stream);
  std::size_t load_pinned(ManagedRegion& region, const std::vector<PageIndex>& pages,
                          StreamHandle stream);
  bool all_present(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  void retire(ManagedRegion& region) noexcept;

  // On the load thread.
  std::size_t load(ManagedRegion& region, const std::vector<PageIndex>& pages, Urgency urgency);
  /// Charges those of `pages` that are absent and marks them as loading, evicting others for them.
  /// @return these; nothing where there is no room worth taking.
  std::optional<std::vector<PageIndex>> take_room(ManagedRegion& region,
                                                  const std::vector<PageIndex>& pages,
                                                  Urgency urgency);
  void issue_load(ManagedRegion& region, const std::vector<PageIndex>& pages, Urgency urgency);
  void run_demands();
  /// Has room made for what comes after `pages`.
  void ask_for_room_ahead(ManagedRegion& region, const std::vector<PageIndex>& pages);
  void begin_evictions(const std::vector<std::shared_ptr<Eviction>>& evictions);

  // On the evict thread.
  void carry_out(Eviction& eviction) noexcept;
  std::size_t drop(ManagedRegion& region, const std::vector<PageIndex>& pages);
  /// Drops pages that are marked as evicting, and `strays`, which are absent for the ledger.
  std::size_t drop_marked(ManagedRegion& region, const std::vector<PageIndex>& pages,
                          const std::vector<PageIndex>& strays);
  void make_room_ahead(ManagedRegion& region, StepTime after);

  // On either.
  void issue_evict(ManagedRegion& region, const std::vector<PageIndex>& pages,
                   const OwnedStream& stream);
  /// What the stream was given so far, to be waited for or measured.
  Event record(const OwnedStream& stream);
  /// Waits for a stream in which something failed, and takes the error out of it.
  void settle(const OwnedStream& stream) noexcept;

  // With mutex_ held.
  /// @param asked  Pages that count as asked for ahead until then.
  Hold hold(ManagedRegion& region, std::vector<PageIndex> asked = {});
  /// When the last of `pages` is used next; pages that are pinned are used now.
  StepTime time_wanted(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  struct Missing {
    std::size_t count = 0;
    StepTime last_use = 0;
  };
  /// The first absent pages that are used later than `after`, at most a pass ahead.
  Missing missing_after(const ManagedRegion& region, StepTime after, std::size_t most) const;
  bool dropping(const ManagedRegion& region, const std::vector<PageIndex>& pages) const;
  /// Victims of `nbytes` together, in all regions; none where that much is not to be had.
  std::vector<Victims> choose_victims(ManagedRegion& wanting, std::size_t nbytes, StepTime after,
                                      Urgency urgency) const;
  /// At least `count` victims of one region if it has them, in order.
  std::vector<PageIndex> victims_of(const ManagedRegion& region, std::size_t count, StepTime after,
                                    Readers readers) const;
  void mark_evicting(ManagedRegion& region, const std::vector<PageIndex>& pages);
  void unmark_evicting(ManagedRegion& region, const std::vector<PageIndex>& pages);
  AheadSizes sizes_of(const ManagedRegion& region) const;
  CapExceededError refusal(const ManagedRegion& region, std::size_t nbytes) const;
  void touch(ManagedRegion& region);

  std::shared_ptr<Device> device_;
  std::shared_ptr<Budget> budget_;
  std::size_t page_size_;

  mutable std::mutex mutex_;  // page tables, events and figures of all regions
  // Notified of all that someone may wait for: requests done, evictions over, demands.
  std::unique_ptr<std::condition_variable> changed_ = std::make_unique<std::condition_variable>();
  std::vector<ManagedRegion*> regions_;
  std::deque<std::shared_ptr<Request>> demands_;
  std::size_t evicting_bytes_ = 0;  // of pages marked as evicting
  std::size_t retiring_ = 0;        // regions that are no longer in the list, but still charged
  std::uint64_t activity_ = 0;
  PagerStats stats_;

  // Loads take turns, since the driver begins one only when the stream's last one is over.
  std::array<OwnedStream, 2> load_streams_;
  std::size_t next_load_ = 0;  // touched by the load thread only
  OwnedStream evict_stream_;
  // Last, as they use all the others; the load thread gives work to the evict thread.
  TaskThread evict_thread_{TaskThread::AtEnd::kDrop};
  TaskThread load_thread_{TaskThread::AtEnd::kDrop};
};

}  // namespace penstock
