#include "host_tier/overlay.hpp"

#include <algorithm>
#include <cstring>
#include <exception>
#include <iterator>
#include <utility>

#include "io/mapping.hpp"

namespace penstock {

namespace {

constexpr std::size_t kChunk = std::size_t{256} << 10;  // buffers of models are small

}  // namespace

Overlay::Overlay(std::shared_ptr<Device> device) : device_(std::move(device)) {}

Overlay::~Overlay() {
  for (const Chunk& chunk : chunks_) {
    try {
      device_->pinned_free(chunk.address, chunk.nbytes);
    } catch (const std::exception& error) {
      device_->suppress(error.what());
    }
  }
}

// Calls `visit(start, nbytes, address)` for the runs in a range; the caller holds the lock.
template <typename Visit>
void Overlay::visit(std::size_t offset, std::size_t nbytes, Visit visit) const {
  const std::size_t end = offset + nbytes;
  auto run = runs_.upper_bound(offset);
  if (run != runs_.begin()) --run;
  for (; run != runs_.end() && run->first < end; ++run) {
    const std::size_t start = std::max(offset, run->first);
    const std::size_t stop = std::min(end, run->first + run->second.nbytes);
    if (start < stop) visit(start, stop - start, run->second.address + (start - run->first));
  }
}

std::byte* Overlay::take(std::size_t nbytes) {
  if (nbytes > left_) {
    const std::size_t size = round_up(std::max(nbytes, kChunk), system_page());
    chunks_.reserve(chunks_.size() + 1);
    chunks_.push_back({static_cast<std::byte*>(device_->pinned_allocate(size)), size});
    left_ = size;
  }
  const Chunk& chunk = chunks_.back();
  std::byte* address = chunk.address + (chunk.nbytes - left_);
  left_ -= nbytes;
  return address;
}

// Stores bytes of which none was written before.
void Overlay::add(std::size_t offset, const std::byte* source, std::size_t nbytes) {
  std::byte* address = take(nbytes);
  std::memcpy(address, source, nbytes);
  const auto next = runs_.lower_bound(offset);
  if (next != runs_.begin()) {  // goes on where the run before ends, here and in memory
    const auto before = std::prev(next);
    if (before->first + before->second.nbytes == offset &&
        before->second.address + before->second.nbytes == address) {
      before->second.nbytes += nbytes;
      return;
    }
  }
  runs_.emplace_hint(next, offset, Run{address, nbytes});
}

void Overlay::write(std::size_t offset, const std::byte* source, std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  struct Gap {
    std::size_t offset;
    std::size_t nbytes;
  };
  std::vector<Gap> gaps;
  std::size_t at = offset;
  visit(offset, nbytes, [&](std::size_t start, std::size_t size, std::byte* address) {
    if (start > at) gaps.push_back({at, start - at});
    std::memcpy(address, source + (start - offset), size);
    at = start + size;
  });
  if (at < offset + nbytes) gaps.push_back({at, offset + nbytes - at});
  for (const Gap& gap : gaps) add(gap.offset, source + (gap.offset - offset), gap.nbytes);
}

void Overlay::read(std::size_t offset, std::byte* target, std::size_t nbytes) const {
  const std::lock_guard lock(mutex_);
  visit(offset, nbytes, [&](std::size_t start, std::size_t size, const std::byte* address) {
    std::memcpy(target + (start - offset), address, size);
  });
}

std::vector<Piece> Overlay::pieces(std::size_t offset, std::size_t nbytes) const {
  const std::lock_guard lock(mutex_);
  std::vector<Piece> found;
  visit(offset, nbytes, [&](std::size_t start, std::size_t size, const std::byte* address) {
    found.push_back({address, start - offset, size});
  });
  return found;
}

std::size_t Overlay::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  std::size_t nbytes = 0;
  for (const Chunk& chunk : chunks_) nbytes += chunk.nbytes;
  return nbytes;
}

std::vector<Piece> merge_pieces(std::vector<Piece> pieces, const std::vector<Piece>& others) {
  const auto before = [](const Piece& a, const Piece& b) { return a.offset < b.offset; };
  const auto middle = static_cast<std::ptrdiff_t>(pieces.size());
  pieces.insert(pieces.end(), others.begin(), others.end());
  std::inplace_merge(pieces.begin(), pieces.begin() + middle, pieces.end(), before);
  return pieces;
}

}  // namespace penstock
