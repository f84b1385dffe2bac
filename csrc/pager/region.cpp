#include "pager/region.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace penstock {

Region::Region(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size)
    : device_(std::move(device)), nbytes_(nbytes), page_size_(page_size) {}

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
