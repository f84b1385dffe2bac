#include "region/region.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace penstock {

Region::Region(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size)
    : device_(std::move(device)), nbytes_(nbytes), page_size_(page_size) {}

void Region::set_observer(PageObserver* observer) {
  const std::lock_guard lock(observer_mutex_);
  observer_ = observer;
}

void Region::drop_observer(const PageObserver* observer) {
  const std::lock_guard lock(observer_mutex_);
  if (observer_ == observer) observer_ = nullptr;
}

void Region::notify_load(PageIndex first, std::size_t count, std::size_t nbytes, const Event& start,
                         const Event& ready, bool demanded) {
  const std::lock_guard lock(observer_mutex_);
  if (observer_ != nullptr) observer_->on_load(first, count, nbytes, start, ready, demanded);
}

void Region::notify_evict(PageIndex first, std::size_t count, const Event& start,
                          const Event& end) {
  const std::lock_guard lock(observer_mutex_);
  if (observer_ != nullptr) observer_->on_evict(first, count, start, end);
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
