// A region is one model's range of device addresses, divided into pages; tensors are views into it
// and their addresses never change. It owns the memory and lives as long as the last tensor on it.
// What is resident is its pager's business, and the page table and the events here are guarded by
// the pager's lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device/handles.hpp"
#include "page_table/page_table.hpp"

namespace penstock {

class ManagedPager;

class Region {
 public:
  /// Waits for work that still reads the region, gives the memory back, then its charge.
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  std::byte* address() const noexcept { return address_; }
  std::size_t nbytes() const noexcept { return nbytes_; }
  std::size_t page_size() const noexcept { return page_size_; }
  std::size_t page_count() const noexcept { return table_.page_count(); }
  Access access() const noexcept { return access_; }
  Device& device() const noexcept { return *device_; }

  /// Bytes of one page: the page size, but for a shorter last page, in whole system pages.
  std::size_t page_nbytes(PageIndex page) const noexcept;
  /// Pages that `nbytes` at `start` touch. @throws std::out_of_range outside the region.
  std::vector<PageIndex> pages_of(std::size_t start, std::size_t nbytes) const;

 private:
  friend class ManagedPager;
  using Event = std::shared_ptr<OwnedEvent>;

  // Who must be waited for before a page may be read, and before it may be dropped.
  struct PageEvents {
    Event ready;                                   // its load; null: nothing to wait for
    std::vector<std::pair<void*, Event>> readers;  // the last use on each stream
  };

  Region(std::shared_ptr<ManagedPager> pager, std::shared_ptr<Device> device, std::size_t nbytes,
         std::size_t page_size, Access access);

  std::shared_ptr<ManagedPager> pager_;
  std::shared_ptr<Device> device_;
  std::size_t nbytes_;
  std::size_t reserved_;  // nbytes_ in whole system pages: what is charged, loaded and evicted
  std::size_t page_size_;
  Access access_;
  std::optional<ManagedRange> memory_;
  std::byte* address_;

  PageTable table_;
  std::vector<PageEvents> events_;
  bool sealed_ = false;              // touched by the pager's thread only
  std::size_t pending_ = 0;          // requests the pager's thread has not finished
  bool active_ = false;              // in use: others take its pages only when they must
  std::uint64_t last_activity_ = 0;  // of the region as a whole
};

}  // namespace penstock
