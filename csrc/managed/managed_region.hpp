// A region of managed memory (cudaMallocManaged): reading a page at any time is right, being
// resident decides how fast. What is resident is its ManagedPager's business, and the page table
// and the events here are guarded by the pager's lock.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device/handles.hpp"
#include "io/fill_target.hpp"
#include "managed/page_table.hpp"
#include "region/region.hpp"

namespace penstock {

class ManagedPager;

class ManagedRegion : public Region, public FillTarget {
 public:
  /// Waits for work that still reads the region, gives the memory back, then its charge.
  ~ManagedRegion() override;

  Access access() const noexcept { return access_; }
  /// Bytes of one page: the page size, but for a shorter last page, in whole system pages.
  std::size_t page_nbytes(PageIndex page) const noexcept;

  bool begin(const std::vector<PageIndex>& pages, StreamHandle stream) override;
  void end(const std::vector<PageIndex>& pages, StreamHandle stream) override;
  bool settled(const std::vector<PageIndex>& pages, StreamHandle stream) const override;
  std::size_t evict(const std::vector<PageIndex>& pages) override;
  void set_schedule(std::vector<std::vector<PageIndex>> steps) override;
  void advance(StepIndex step) override;
  /// Says which pages a plan wants resident; see ManagedPager.
  void keep(const std::vector<PageIndex>& pages);
  std::size_t load_ahead(const std::vector<PageIndex>& pages) override;
  std::vector<bool> staying() const override;
  std::size_t ahead_batch() const override;
  std::size_t ahead_window() const override;
  RegionStats stats() const override;
  void require_writable() const override {}
  bool keeps_writes() const override { return true; }
  /// Where the region is read-mostly, blocks the caller.
  void note_write(std::size_t offset, std::size_t nbytes, StreamHandle stream) override;
  void flush() override {}  // what was written is where it was written
  /// Puts bytes in, making no page resident. @throws ScheduleError for a read-mostly region of
  /// which pages were loaded: it is filled before.
  void write(std::size_t offset, const void* source, std::size_t nbytes);

  void check_range(std::size_t offset, std::size_t nbytes) const override;
  void fill_from(const File& file, std::uint64_t file_offset, std::size_t offset,
                 std::size_t nbytes) override;

 private:
  friend class ManagedPager;

  // Who must be waited for before a page may be read, and before it may be dropped.
  struct PageEvents {
    Event ready;                                   // its load; null: nothing to wait for
    std::vector<std::pair<void*, Event>> readers;  // the last use on each stream
  };

  ManagedRegion(std::shared_ptr<ManagedPager> pager, std::shared_ptr<Device> device,
                std::size_t nbytes, std::size_t page_size, Access access);

  std::shared_ptr<ManagedPager> pager_;
  std::size_t reserved_;  // nbytes_ in whole system pages: what is charged, loaded and evicted
  Access access_;
  std::optional<ManagedRange> memory_;

  PageTable table_;
  std::vector<PageEvents> events_;
  std::vector<std::uint32_t> asked_;       // by page: unfinished requests to load it ahead
  std::vector<PageIndex> strays_;          // absent pages that are being dropped; ascending
  std::atomic<bool> sealed_{false};        // set by the pager's load thread
  bool room_asked_ = false;                // whether the evict thread is to make room ahead
  std::size_t pending_ = 0;                // requests the pager's threads have not finished
  bool active_ = false;                    // in use: others take its pages only when they must
  std::optional<std::uint32_t> turn_ = 0;  // when others take them, lower first; none: never
  std::uint64_t last_activity_ = 0;        // of the region as a whole
};

}  // namespace penstock
