#include "allocator/overflow.hpp"

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

namespace penstock {

namespace {

constexpr std::size_t kUnit = std::size_t{1} << 20;  // so that similar sizes share their memory
constexpr int kRounds = 8;  // of waiting for one request, while others take what comes free

std::size_t piece_size(std::size_t requested) {
  if (requested > kUnit) return (requested + kUnit - 1) / kUnit * kUnit;
  std::size_t nbytes = kBlockAlignment;
  while (nbytes < requested) nbytes *= 2;
  return nbytes;
}

template <typename Element>
Element take_last(std::vector<Element>& elements) {
  Element last = elements.back();
  elements.pop_back();
  return last;
}

}  // namespace

Overflow::Overflow(std::shared_ptr<Device> device)
    : device_(std::move(device)), held_back_(device_) {}

void Overflow::set_limit(std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  stats_.limit = nbytes;
}

// A block that was freed on this very stream, or that nothing uses any more.
Overflow::Piece* Overflow::find_free(std::size_t nbytes, StreamHandle stream) {
  Shelf& shelf = shelves_[nbytes];
  const auto quick = shelf.quick.find(stream.value);
  if (quick != shelf.quick.end() && !quick->second.empty()) return take_last(quick->second);
  if (shelf.free.empty()) return nullptr;
  Piece* piece = take_last(shelf.free);
  --piece->range->free;
  return piece;
}

LiveBlock Overflow::hand_out(Piece& piece, std::size_t requested, StreamHandle stream,
                             std::uint64_t sequence) {
  piece.state = BlockState::kLive;
  piece.stream = stream;
  piece.streams.clear();
  piece.requested = requested;
  piece.sequence = sequence;
  stats_.live += piece.nbytes;
  stats_.peak = std::max(stats_.peak, stats_.live);
  return describe(piece);
}

void Overflow::shelve(Piece& piece) {
  piece.state = BlockState::kFree;
  shelves_[piece.nbytes].free.push_back(&piece);
  ++piece.range->free;
}

// A piece of a new range, and the range's other ones on their shelf; null where the device has no
// memory. The bytes are counted before there are any.
Overflow::Piece* Overflow::make(Lock& lock, std::size_t nbytes) {
  const std::size_t whole = std::max(nbytes, kUnit);
  std::unique_ptr<Range> range;
  stats_.held += whole;
  lock.unlock();
  try {
    range.reset(
        new Range{{device_, whole, Access::kReadWrite}, std::vector<Piece>(whole / nbytes)});
    device_->managed_stay(range->memory.address(), whole);
  } catch (const std::exception& error) {
    device_->suppress(error.what());
    range.reset();
  }
  lock.lock();
  if (!range) {
    stats_.held -= whole;
    return nullptr;
  }
  std::byte* start = range->memory.address();
  for (Piece& piece : range->pieces) {
    piece.range = range.get();
    piece.start = start;
    piece.nbytes = nbytes;
    pieces_.emplace(start, &piece);
    start += nbytes;
  }
  for (std::size_t i = range->pieces.size(); i-- > 1;) shelve(range->pieces[i]);
  ranges_.push_back(std::move(range));
  return &ranges_.back()->pieces.front();
}

std::optional<LiveBlock> Overflow::take(std::size_t requested, StreamHandle stream,
                                        std::uint64_t sequence) {
  const RelaxedCapture relaxed(*device_);
  Lock lock(mutex_);
  if (requested > stats_.limit) return std::nullopt;
  const std::size_t nbytes = piece_size(requested);
  for (int round = 0; round < kRounds; ++round) {
    retire();
    Piece* piece = find_free(nbytes, stream);
    if (piece == nullptr && stats_.held <= stats_.limit &&
        std::max(nbytes, kUnit) <= stats_.limit - stats_.held) {
      piece = make(lock, nbytes);
      if (piece == nullptr) return std::nullopt;
    }
    if (piece != nullptr) return hand_out(*piece, requested, stream, sequence);
    if (release_free(lock) == 0 && !wait_for_freed(lock)) return std::nullopt;
  }
  return std::nullopt;
}

std::size_t Overflow::release_free(Lock& lock) {
  for (auto& [nbytes, shelf] : shelves_) {
    const auto leaves = [](const Piece* piece) { return piece->range->unused(); };
    shelf.free.erase(std::remove_if(shelf.free.begin(), shelf.free.end(), leaves),
                     shelf.free.end());
  }
  const auto first_unused =
      std::partition(ranges_.begin(), ranges_.end(),
                     [](const std::unique_ptr<Range>& range) { return !range->unused(); });
  std::vector<std::unique_ptr<Range>> leaving(std::make_move_iterator(first_unused),
                                              std::make_move_iterator(ranges_.end()));
  if (leaving.empty()) return 0;
  ranges_.erase(first_unused, ranges_.end());
  std::size_t nbytes = 0;
  for (const std::unique_ptr<Range>& range : leaving) {
    nbytes += range->memory.nbytes();
    for (const Piece& piece : range->pieces) pieces_.erase(piece.start);
  }
  lock.unlock();
  leaving.clear();
  lock.lock();
  stats_.held -= nbytes;
  return nbytes;
}

// Whether there was something to wait for.
bool Overflow::wait_for_freed(Lock& lock) {
  for (auto& [nbytes, shelf] : shelves_) {
    for (const auto& [stream, pieces] : shelf.quick) {
      for (Piece* piece : pieces) {
        piece->state = BlockState::kHeld;
        held_back_.hold(piece, {piece->stream});
      }
    }
    shelf.quick.clear();
  }
  const std::vector<Event> events = held_back_.pending();
  if (events.empty()) return false;
  lock.unlock();
  try {
    for (const Event& event : events) wait_until_over(*device_, event);
  } catch (const std::exception& error) {
    device_->suppress(error.what());
    lock.lock();
    return false;
  }
  lock.lock();
  return true;
}

void Overflow::retire() {
  retired_.clear();
  held_back_.retire(retired_);
  for (Block* block : retired_) shelve(static_cast<Piece&>(*block));
}

Overflow::Piece* Overflow::live(const void* address) const {
  const auto found = pieces_.find(address);
  if (found == pieces_.end() || found->second->state != BlockState::kLive) return nullptr;
  return found->second;
}

LiveBlock Overflow::describe(const Piece& piece) {
  return {piece.start, piece.nbytes, piece.requested, piece.stream, piece.sequence, {}};
}

std::optional<LiveBlock> Overflow::give(void* address) {
  const std::lock_guard lock(mutex_);
  Piece* piece = live(address);
  if (piece == nullptr) return std::nullopt;
  const LiveBlock block = describe(*piece);
  stats_.live -= piece->nbytes;
  if (piece->streams.empty()) {
    piece->state = BlockState::kQuick;
    shelves_[piece->nbytes].quick[piece->stream.value].push_back(piece);
  } else {
    piece->streams.push_back(piece->stream);
    piece->state = BlockState::kHeld;
    held_back_.hold(piece, piece->streams);
  }
  return block;
}

bool Overflow::record_stream(void* address, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  Piece* piece = live(address);
  if (piece == nullptr) return false;
  const auto same = [&](StreamHandle other) { return other.value == stream.value; };
  if (!same(piece->stream) && std::none_of(piece->streams.begin(), piece->streams.end(), same)) {
    piece->streams.push_back(stream);
  }
  return true;
}

std::size_t Overflow::empty_cache() {
  const RelaxedCapture relaxed(*device_);
  Lock lock(mutex_);
  retire();  // which records what could not be recorded before
  if (wait_for_freed(lock)) retire();
  return release_free(lock);
}

std::optional<LiveBlock> Overflow::find(const void* address) const {
  const std::lock_guard lock(mutex_);
  const Piece* piece = live(address);
  if (piece == nullptr) return std::nullopt;
  return describe(*piece);
}

void Overflow::add_live(std::vector<LiveBlock>& blocks) const {
  const std::lock_guard lock(mutex_);
  for (const auto& [address, piece] : pieces_) {
    if (piece->state == BlockState::kLive) blocks.push_back(describe(*piece));
  }
}

OverflowStats Overflow::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace penstock
