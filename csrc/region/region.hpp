// A region is one model's range of device addresses, divided into pages; tensors are views into it
// and their addresses never change. It owns the memory and lives as long as the last tensor on it.
// What puts memory under its pages, and when, is told by its kind: ManagedRegion or FramesRegion.
//
// Using pages: `begin` sees to it that they are in place and orders the caller's stream after their
// loads; until `end`, which says that the stream's work so far was the last to read them, they
// stay. `load_ahead` begins to load pages for later, where that takes nothing away that is needed
// sooner. Thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.hpp"
#include "device/event_pool.hpp"
#include "schedule/schedule.hpp"

namespace penstock {

/// Pages of one region by where they are.
struct RegionStats {
  std::size_t resident_bytes = 0;  ///< Device memory that the region holds.
  std::size_t resident_pages = 0;  ///< Pages whose bytes are in place, or under way.
  std::size_t pinned_pages = 0;
  std::size_t in_place_bytes = 0;  ///< Of the resident pages.
};

/// Is told what a region does to its pages, on whichever thread does it.
class PageObserver {
 public:
  virtual ~PageObserver() = default;
  /// A load of `count` pages from `first` on was given to the device; `ready` is behind it, and
  /// `start`, where loads are traced, before it.
  virtual void on_load(PageIndex first, std::size_t count, std::size_t nbytes, const Event& start,
                       const Event& ready, bool demanded) = 0;
  /// Where that is traced: `count` pages from `first` on gave way to others between two events,
  /// which are one where the others were just copied over them.
  virtual void on_evict(PageIndex first, std::size_t count, const Event& start,
                        const Event& end) = 0;
};

class Region {
 public:
  virtual ~Region() = default;
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::byte* address() const noexcept { return address_; }
  std::size_t nbytes() const noexcept { return nbytes_; }
  std::size_t page_size() const noexcept { return page_size_; }
  std::size_t page_count() const noexcept { return (nbytes_ + page_size_ - 1) / page_size_; }
  Device& device() const noexcept { return *device_; }
  const std::shared_ptr<Device>& device_pointer() const noexcept { return device_; }

  /// Pages that `nbytes` at `start` touch. @throws std::out_of_range outside the region.
  std::vector<PageIndex> pages_of(std::size_t start, std::size_t nbytes) const;

  /// Brings pages in and orders `stream` after that.
  /// @return whether any of them gives way to others when it is let go of.
  /// @throws CapExceededError where they do not fit beside what is in use; nothing is held then.
  virtual bool begin(const std::vector<PageIndex>& pages, StreamHandle stream) = 0;
  /// The same where all of the pages are in place, with nothing to wait for, and to stay there.
  /// Never waits. @return whether it is so, and could be told at once; if not, nothing has
  /// happened.
  virtual bool begin_in_place(const std::vector<PageIndex>& /*pages*/) { return false; }
  /// Lets go of what `begin_in_place` took as `end` does, if that can be done at once.
  virtual bool end_in_place(const std::vector<PageIndex>& /*pages*/, StreamHandle /*stream*/) {
    return false;
  }
  /// Lets go of pages once the work given to `stream` so far has run.
  virtual void end(const std::vector<PageIndex>& pages, StreamHandle stream) = 0;
  /// Whether `begin` would find the pages in place and have nothing to order `stream` after.
  virtual bool settled(const std::vector<PageIndex>& pages, StreamHandle stream) const = 0;
  /// Drops those of `pages` that are not in use. @return bytes given back to the budget.
  virtual std::size_t evict(const std::vector<PageIndex>& pages) = 0;
  /// To be asked before pages are written to. @throws ModelError where that could not be kept.
  virtual void require_writable() const = 0;
  /// Whether it could.
  virtual bool keeps_writes() const = 0;
  /// Says that the work of `stream` so far has written to a range that is in use: it is kept.
  virtual void note_write(std::size_t offset, std::size_t nbytes, StreamHandle stream) = 0;
  /// Has all that was written where the host reads it; returns when it is there.
  virtual void flush() = 0;

  /// Replaces the schedule: the pages that each step of a pass reads. Its first step is the next.
  virtual void set_schedule(std::vector<std::vector<PageIndex>> steps) = 0;
  /// The next occurrence of `step` begins now.
  virtual void advance(StepIndex step) = 0;
  /// Begins to load pages for later steps, the first of them first. Never waits for the device.
  /// @return how many of them, counted from the first, are in place or on their way now.
  virtual std::size_t load_ahead(const std::vector<PageIndex>& pages) = 0;
  /// Which pages, by index, are in place for good, so that nobody need ask for them ahead, and
  /// loads best end where one of them lies between; empty where the region does not tell.
  virtual std::vector<bool> staying() const { return {}; }
  /// How many pages `load_ahead` is best given at once, and how many may be ahead of their use.
  virtual std::size_t ahead_batch() const = 0;
  virtual std::size_t ahead_window() const = 0;
  /// For how many pages that have become free a load is worth its while.
  virtual std::size_t least_load() const { return 1; }

  virtual RegionStats stats() const = 0;

  /// Who is told of loads, and of traced evictions, in place of the one before.
  void set_observer(PageObserver* observer);
  /// Tells `observer` nothing any more; on return no call of it is under way.
  void drop_observer(const PageObserver* observer);
  /// Whether the beginning of loads is noted too, and what gives way to them.
  void set_trace(bool trace) noexcept { trace_ = trace; }

 protected:
  Region(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size);

  void notify_load(PageIndex first, std::size_t count, std::size_t nbytes, const Event& start,
                   const Event& ready, bool demanded);
  void notify_evict(PageIndex first, std::size_t count, const Event& start, const Event& end);

  std::shared_ptr<Device> device_;
  std::size_t nbytes_;
  std::size_t page_size_;
  std::byte* address_ = nullptr;
  std::atomic<bool> trace_{false};

 private:
  std::mutex observer_mutex_;  // held while the observer is called
  PageObserver* observer_ = nullptr;
};

}  // namespace penstock
