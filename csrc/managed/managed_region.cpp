#include "managed/managed_region.hpp"

#include <algorithm>
#include <utility>

#include "error/error.hpp"
#include "managed/managed_pager.hpp"

namespace penstock {

namespace {

constexpr std::size_t kSystemPage = 4096;  // the smallest that a system makes resident

}  // namespace

ManagedRegion::ManagedRegion(std::shared_ptr<ManagedPager> pager, std::shared_ptr<Device> device,
                             std::size_t nbytes, std::size_t page_size, Access access)
    : Region(std::move(device), nbytes, page_size),
      pager_(std::move(pager)),
      reserved_((nbytes + kSystemPage - 1) / kSystemPage * kSystemPage),
      access_(access),
      memory_(std::in_place, device_, reserved_, access),
      table_(page_count()),
      events_(page_count()),
      asked_(page_count()) {
  address_ = memory_->address();
}

ManagedRegion::~ManagedRegion() {
  pager_->retire(*this);
}

std::size_t ManagedRegion::page_nbytes(PageIndex page) const noexcept {
  const std::size_t start = std::size_t{page} * page_size_;
  return std::min(page_size_, reserved_ - start);
}

bool ManagedRegion::begin(const std::vector<PageIndex>& pages, StreamHandle stream) {
  pager_->begin(*this, pages, stream);
  return true;
}

void ManagedRegion::end(const std::vector<PageIndex>& pages, StreamHandle stream) {
  pager_->end(*this, pages, stream);
}

std::size_t ManagedRegion::evict(const std::vector<PageIndex>& pages) {
  return pager_->evict(*this, pages);
}

bool ManagedRegion::settled(const std::vector<PageIndex>& pages, StreamHandle /*stream*/) const {
  return pager_->settled(*this, pages);
}

void ManagedRegion::set_schedule(std::vector<std::vector<PageIndex>> steps) {
  pager_->set_schedule(*this, std::move(steps));
}

void ManagedRegion::advance(StepIndex step) {
  pager_->advance(*this, step);
}

std::size_t ManagedRegion::load_ahead(const std::vector<PageIndex>& pages) {
  pager_->prefetch_ahead(*this, pages);
  return pages.size();
}

std::vector<bool> ManagedRegion::staying() const {
  return pager_->staying(*this);
}

std::size_t ManagedRegion::ahead_batch() const {
  return pager_->ahead_sizes(*this).batch;
}

std::size_t ManagedRegion::ahead_window() const {
  return pager_->ahead_sizes(*this).window;
}

void ManagedRegion::note_write(std::size_t offset, std::size_t nbytes, StreamHandle stream) {
  check_range(offset, nbytes);
  if (access_ == Access::kReadWrite || nbytes == 0) return;
  // By whole blocks: what else was written to them would be lost with the duplicate.
  constexpr std::size_t kBlock = Device::kManagedBlock;
  const std::size_t start = offset / kBlock * kBlock;
  const std::size_t end = std::min((offset + nbytes + kBlock - 1) / kBlock * kBlock, reserved_);
  device_->managed_keep(address_ + start, end - start, stream);
}

void ManagedRegion::write(std::size_t offset, const void* source, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (sealed_) {
    throw ScheduleError(
        "write: pages of this read-mostly region were loaded; fill it before, or "
        "reserve a writable one");
  }
  device_->managed_write(address_ + offset, source, nbytes);
}

void ManagedRegion::keep(const std::vector<PageIndex>& pages) {
  pager_->keep(*this, pages);
}

RegionStats ManagedRegion::stats() const {
  return pager_->region_stats(*this);
}

void ManagedRegion::check_range(std::size_t offset, std::size_t nbytes) const {
  static_cast<void>(pages_of(offset, nbytes));
}

void ManagedRegion::fill_from(const File& file, std::uint64_t file_offset, std::size_t offset,
                              std::size_t nbytes) {
  device_->managed_read(address_ + offset, file, file_offset, nbytes);
}

}  // namespace penstock
