#include "pager/region.hpp"

#include <stdexcept>
#include <string>

#include "pager/managed_pager.hpp"

namespace penstock {

namespace {

constexpr std::size_t kSystemPage = 4096;  // the smallest that a system makes resident

}  // namespace

Region::Region(std::shared_ptr<ManagedPager> pager, std::shared_ptr<Device> device,
               std::size_t nbytes, std::size_t page_size, Access access)
    : pager_(std::move(pager)),
      device_(std::move(device)),
      nbytes_(nbytes),
      reserved_((nbytes + kSystemPage - 1) / kSystemPage * kSystemPage),
      page_size_(page_size),
      access_(access),
      memory_(std::in_place, device_, reserved_, access),
      address_(memory_->address()),
      table_((nbytes + page_size - 1) / page_size),
      events_(table_.page_count()) {}

Region::~Region() {
  pager_->retire(*this);
}

std::size_t Region::page_nbytes(PageIndex page) const noexcept {
  const std::size_t start = std::size_t{page} * page_size_;
  return std::min(page_size_, reserved_ - start);
}

std::vector<PageIndex> Region::pages_of(std::size_t start, std::size_t nbytes) const {
  if (start > nbytes_ || nbytes > nbytes_ - start) {
    throw std::out_of_range("bytes [" + std::to_string(start) + ", " + std::to_string(start) +
                            " + " + std::to_string(nbytes) + ") leave the region of " +
                            std::to_string(nbytes_) + " bytes");
  }
  std::vector<PageIndex> pages;
  if (nbytes == 0) return pages;
  const std::size_t last = (start + nbytes - 1) / page_size_;
  for (std::size_t page = start / page_size_; page <= last; ++page) {
    pages.push_back(static_cast<PageIndex>(page));
  }
  return pages;
}

}  // namespace penstock
