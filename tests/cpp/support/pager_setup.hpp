// A managed pager on the host device, its parts in reach, and small helpers to say what tests do.
#pragma once

#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "device/testing/faulty_device.hpp"
#include "error/error.hpp"
#include "managed/managed_pager.hpp"
#include "support/child.hpp"
#include "support/files.hpp"
#include "support/spying_device.hpp"

namespace penstock::testing {

using Pages = std::vector<PageIndex>;

inline constexpr std::size_t kPage = std::size_t{64} << 10;
inline constexpr StreamHandle kCaller{};  ///< The calling thread's own order of work.

/// first, first + 1, ... up to, but not including, last.
inline Pages pages_between(PageIndex first, PageIndex last) {
  Pages pages(last - first);
  std::iota(pages.begin(), pages.end(), first);
  return pages;
}

struct PagerSetup {
  explicit PagerSetup(std::size_t cap_pages, std::size_t page = kPage)
      : page_size(page),
        budget(std::make_shared<Budget>(cap_pages * page)),
        pager(ManagedPager::create(device, budget, page)) {}

  std::shared_ptr<ManagedRegion> reserve(std::size_t page_count,
                                         Access access = Access::kReadMostly) {
    return pager->reserve(page_count * page_size, access);
  }
  std::size_t used_pages() const { return budget->stats().used / page_size; }

  std::size_t page_size;
  std::shared_ptr<SpyingDevice> spy = std::make_shared<SpyingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(spy);
  std::shared_ptr<Budget> budget;
  std::shared_ptr<ManagedPager> pager;
};

/// Begins and ends one step that reads `pages` on the calling thread.
inline void run_step(ManagedPager& pager, ManagedRegion& region, const Pages& pages) {
  pager.begin(region, pages, kCaller);
  pager.end(region, pages, kCaller);
}

/// Which pages are resident and not pinned. It finds out by evicting them: the last thing to ask.
inline Pages take_stock(ManagedPager& pager, ManagedRegion& region) {
  Pages found;
  for (PageIndex page = 0; page < region.page_count(); ++page) {
    if (pager.evict(region, {page}) > 0) found.push_back(page);
  }
  return found;
}

/// Uses the pager in a forked child, which lets go of region and pager then. @return whether the
/// child was told that it cannot, and left cleanly.
inline bool forked_child_is_told(PagerSetup& setup, std::shared_ptr<ManagedRegion>& region,
                                 PageIndex page) {
  const ChildEnd child = run_in_child([&] {
    try {
      setup.pager->begin(*region, {page}, kCaller);
      return 1;
    } catch (const Error&) {
    }
    region.reset();
    setup.pager.reset();
    return 0;
  });
  return child.signal == 0 && child.exit_code == 0;
}

/// Fills the region with a pattern, resident or not.
inline Bytes fill(ManagedRegion& region, std::size_t seed) {
  Bytes bytes = pattern(region.nbytes(), seed);
  region.device().managed_write(region.address(), bytes.data(), bytes.size());
  return bytes;
}

inline bool holds(const ManagedRegion& region, const Bytes& bytes) {
  return std::memcmp(region.address(), bytes.data(), bytes.size()) == 0;
}

}  // namespace penstock::testing
