#include "allocator/overflow.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace penstock {

namespace {

constexpr std::size_t kUnit = std::size_t{1} << 20;  // so that similar sizes share their memory
constexpr int kRounds = 8;  // of waiting for one request, while others take what comes free

}  // namespace

Overflow::Overflow(std::shared_ptr<Device> device)
    : device_(std::move(device)), held_back_(device_) {}

void Overflow::set_limit(std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  stats_.limit = nbytes;
}

// A block that was freed on this very stream, or that nothing uses any more.
Overflow::Piece* Overflow::find_free(std::size_t nbytes, StreamHandle stream) {
  Piece* found = nullptr;
  for (const auto& [address, piece] : pieces_) {
    if (piece->nbytes != nbytes) continue;
    if (piece->state == BlockState::kQuick && piece->stream.value == stream.value) {
      return piece.get();
    }
    if (piece->state == BlockState::kFree) found = piece.get();
  }
  return found;
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

// Null where the device has no memory. The bytes are counted before there are any.
std::unique_ptr<Overflow::Piece> Overflow::make(Lock& lock, std::size_t nbytes) {
  auto piece = std::make_unique<Piece>();
  stats_.held += nbytes;
  lock.unlock();
  try {
    piece->memory = std::make_unique<ManagedRange>(device_, nbytes, Access::kReadWrite);
    device_->managed_stay(piece->memory->address(), nbytes);
    piece->start = piece->memory->address();
    piece->nbytes = nbytes;
  } catch (const std::exception& error) {
    device_->suppress(error.what());
    piece.reset();
  }
  lock.lock();
  if (!piece) stats_.held -= nbytes;
  return piece;
}

std::optional<LiveBlock> Overflow::take(std::size_t requested, StreamHandle stream,
                                        std::uint64_t sequence) {
  const RelaxedCapture relaxed(*device_);
  Lock lock(mutex_);
  if (requested > stats_.limit) return std::nullopt;
  const std::size_t nbytes = (requested + kUnit - 1) / kUnit * kUnit;
  for (int round = 0; round < kRounds; ++round) {
    retire();
    if (Piece* piece = find_free(nbytes, stream)) {
      return hand_out(*piece, requested, stream, sequence);
    }
    if (stats_.held <= stats_.limit && nbytes <= stats_.limit - stats_.held) {
      std::unique_ptr<Piece> piece = make(lock, nbytes);
      if (!piece) return std::nullopt;
      Piece& made = *piece;
      pieces_.emplace(made.start, std::move(piece));
      return hand_out(made, requested, stream, sequence);
    }
    if (release_free(lock) == 0 && !wait_for_freed(lock)) return std::nullopt;
  }
  return std::nullopt;
}

std::size_t Overflow::release_free(Lock& lock) {
  std::vector<std::unique_ptr<Piece>> leaving;
  std::size_t nbytes = 0;
  for (auto at = pieces_.begin(); at != pieces_.end();) {
    if (at->second->state != BlockState::kFree) {
      ++at;
      continue;
    }
    nbytes += at->second->nbytes;
    leaving.push_back(std::move(at->second));
    at = pieces_.erase(at);
  }
  if (leaving.empty()) return 0;
  lock.unlock();
  leaving.clear();
  lock.lock();
  stats_.held -= nbytes;
  return nbytes;
}

// Whether there was something to wait for.
bool Overflow::wait_for_freed(Lock& lock) {
  for (const auto& [address, piece] : pieces_) {
    if (piece->state != BlockState::kQuick) continue;
    piece->state = BlockState::kHeld;
    held_back_.hold(piece.get(), {piece->stream});
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
  for (Block* block : retired_) block->state = BlockState::kFree;
}

Overflow::Piece* Overflow::live(const void* address) const {
  const auto found = pieces_.find(address);
  if (found == pieces_.end() || found->second->state != BlockState::kLive) return nullptr;
  return found->second.get();
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
  piece->state = BlockState::kQuick;
  if (!piece->streams.empty()) {
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
