#include "host_tier/stream_tier.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "error/format.hpp"
#include "io/mapping.hpp"

namespace penstock {

namespace {

// One read: large enough for a disk's full rate, small enough that several readers share a page.
constexpr std::size_t kMostRead = std::size_t{4} << 20;
constexpr std::size_t kReaders = 8;

}  // namespace

StreamTier::StreamTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Source& source, std::size_t ring_bytes, std::size_t threads)
    : HostTier(nbytes, page_size),
      source_(source, nbytes, PageCache::kSpare),
      overlay_(device),
      pages_(page_count()) {
  if (ring_bytes / 2 < page_size) {
    throw std::invalid_argument("a ring of " + format_bytes(ring_bytes) +
                                " is below two pages of " + format_bytes(page_size) + ": give " +
                                format_bytes(2 * page_size) + " or more, or make pages smaller");
  }
  std::vector<PageLayout> layouts;
  std::size_t buffer_bytes = kDirectAlignment;
  for (PageIndex page = 0; page < page_count(); ++page) {
    const std::size_t start = page * page_size;
    layouts.push_back(lay_out_page(source_.parts(start, bytes_of(page)), start, kMostRead));
    buffer_bytes = std::max(buffer_bytes, layouts.back().buffer_bytes);
  }
  buffer_bytes = round_up(buffer_bytes, std::max(system_page(), kDirectAlignment));
  // More buffers than pages would never be used.
  const std::size_t most = std::max<std::size_t>(page_count(), 2);
  const std::size_t count = std::clamp<std::size_t>(ring_bytes / buffer_bytes, 2, most);
  ring_ = std::make_unique<BufferRing>(std::move(device), source_, std::move(layouts), count,
                                       buffer_bytes, threads > 0 ? threads : kReaders);
}

StreamTier::~StreamTier() {
  // A child of fork() has none of the ring's threads, which may hold its locks.
  if (!in_owner_process()) static_cast<void>(ring_.release());
}

void StreamTier::write(std::size_t offset, const void* source, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  source_.refuse_covered(offset, nbytes);
  overlay_.write(offset, static_cast<const std::byte*>(source), nbytes);
}

void StreamTier::expect(std::vector<PageIndex> order) {
  for (const PageIndex page : order) check_page(page);
  require_owner_process();
  ring_->expect(order);
}

bool StreamTier::ready(PageIndex page) {
  check_page(page);
  return ring_->layout(page).reads.empty() ||
         (in_owner_process() && ring_->ready(page) &&
          source_.is_unchanged(page * page_size(), bytes_of(page)));
}

const std::vector<Piece>& StreamTier::fetch(PageIndex page) {
  check_page(page);
  require_owner_process();
  // What is in the ring was right; but what is fetched next, from the same file, may not be.
  source_.require_unchanged(page * page_size(), bytes_of(page));
  const PageLayout& layout = ring_->layout(page);
  const std::byte* buffer = layout.reads.empty() ? nullptr : ring_->fetch(page);
  std::vector<Piece> pieces;
  for (const PagePart& part : layout.parts) {
    pieces.push_back({buffer + part.position, part.offset, part.nbytes});
  }
  const std::size_t start = page * page_size();
  pieces = merge_pieces(std::move(pieces), overlay_.pieces(start, bytes_of(page)));
  pages_[page].swap(pieces);
  return pages_[page];
}

void StreamTier::release(PageIndex page, std::shared_ptr<OwnedEvent> copied) {
  check_page(page);
  require_owner_process();
  if (!ring_->layout(page).reads.empty()) ring_->release(page, std::move(copied));
}

void StreamTier::read(std::size_t offset, void* target, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  source_.read(offset, static_cast<std::byte*>(target), nbytes);
  overlay_.read(offset, static_cast<std::byte*>(target), nbytes);
}

void StreamTier::verify(PageIndex page, const std::byte* bytes) {
  sums_.verify(source_, page * page_size(), bytes, bytes_of(page));
}

HostTierStats StreamTier::stats() const {
  HostTierStats stats;
  stats.pinned_bytes = ring_->pinned_bytes() + overlay_.pinned_bytes();
  stats.read_bytes = ring_->read_bytes();
  return stats;
}

}  // namespace penstock
