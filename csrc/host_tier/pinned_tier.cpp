#include "host_tier/pinned_tier.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <utility>

#include "error/error.hpp"
#include "host_tier/slab.hpp"
#include "io/mapping.hpp"
#include "threading/time_limit.hpp"

namespace penstock {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Registered at once: large enough that copies, which stay within one piece, are as large as a ring
// takes, small enough that the last one, which nothing overlaps, takes some milliseconds.
constexpr std::size_t kRegistered = std::size_t{512} << 20;

}  // namespace

// The slab while it is filled: readers count a piece's missing bytes down, and the registering
// thread waits for them to reach zero.
class PinnedTier::Filling final : public FillTarget {
 public:
  Filling(std::shared_ptr<Device> device, const PinnedTier& tier,
          const std::vector<Extent>& extents)
      : tier_(tier.nbytes()),
        slab_(std::move(device), tier.nbytes()),
        piece_(round_up(kRegistered, tier.page_size())),
        missing_((slab_.nbytes() + piece_ - 1) / piece_) {
    for (const Extent& extent : extents) {
      check_range(extent.region_offset, extent.nbytes);
      count(extent.region_offset, extent.nbytes,
            [](std::atomic<std::size_t>& missing, std::size_t nbytes) { missing += nbytes; });
    }
  }

  std::size_t piece_count() const noexcept { return missing_.size(); }
  std::size_t piece_size() const noexcept { return piece_; }
  std::size_t pieces_up_to(std::size_t end) const noexcept { return (end + piece_ - 1) / piece_; }
  const Slab& slab() const noexcept { return slab_; }

  void check_range(std::size_t offset, std::size_t nbytes) const override {
    if (offset > tier_ || nbytes > tier_ - offset) {
      throw std::out_of_range("an extent of " + std::to_string(nbytes) + " bytes at " +
                              std::to_string(offset) + " leaves the host tier of " +
                              std::to_string(tier_) + " bytes");
    }
  }

  void fill_from(const File& file, std::uint64_t file_offset, std::size_t offset,
                 std::size_t nbytes) override {
    try {
      file.read(slab_.address() + offset, file_offset, nbytes);
    } catch (...) {
      stop();  // the fill job has the error
      throw;
    }
    bool arrived = false;
    count(offset, nbytes, [&](std::atomic<std::size_t>& missing, std::size_t part) {
      arrived = missing.fetch_sub(part) == part || arrived;
    });
    if (arrived) {
      {
        const std::lock_guard lock(mutex_);
      }  // not between the other's look and its sleep
      changed_.notify_all();
    }
  }

  void register_pieces() {
    try {
      for (std::size_t i = 0; i < missing_.size(); ++i) {
        {
          std::unique_lock lock(mutex_);
          changed_.wait(lock, [&] { return stopped_ || (wanted_ && missing_[i] == 0); });
          if (stopped_) return;
        }
        const std::size_t start = i * piece_;
        slab_.register_range(start, std::min(piece_, slab_.nbytes() - start));
        const std::lock_guard lock(mutex_);
        registered_ = i + 1;
        changed_.notify_all();
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      error_ = std::current_exception();
      changed_.notify_all();
    }
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
  }

  /// @return whether the first `pieces` pieces are filled and registered; false also where the
  /// filling was stopped. @throws the error of registering.
  bool wait_for(std::size_t pieces, steady_clock::time_point end) {
    std::unique_lock lock(mutex_);
    if (!std::exchange(wanted_, true)) changed_.notify_all();
    changed_.wait_until(lock, end, [&] { return registered_ >= pieces || stopped_ || error_; });
    if (registered_ < pieces && error_) std::rethrow_exception(error_);
    return registered_ >= pieces;
  }

 private:
  // Calls `change` for each piece that a range touches, with the bytes of it.
  template <typename Change>
  void count(std::size_t offset, std::size_t nbytes, Change change) {
    for (std::size_t done = 0; done < nbytes;) {
      const std::size_t at = offset + done;
      const std::size_t part = std::min(nbytes - done, piece_ - at % piece_);
      change(missing_[at / piece_], part);
      done += part;
    }
  }

  std::size_t tier_;
  Slab slab_;
  std::size_t piece_;
  std::vector<std::atomic<std::size_t>> missing_;  // by piece: bytes to be read
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t registered_ = 0;  // pieces, in order
  bool wanted_ = false;         // somebody waits for them
  bool stopped_ = false;
  std::exception_ptr error_;  // of registering
};

PinnedTier::PinnedTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Source& source, std::size_t threads, PageCache cache)
    : HostTier(nbytes, page_size),
      pages_(page_count()),
      filling_(std::make_shared<Filling>(std::move(device), *this, source.extents)),
      fill_(std::make_unique<FillJob>(filling_, source.paths, source.extents,
                                      threads > 0 ? threads : default_readers(), cache)),
      registrar_(std::make_unique<TaskThread>(TaskThread::AtEnd::kDrop)) {
  for (PageIndex page = 0; page < page_count(); ++page) {
    pages_[page] = {{filling_->slab().address() + page * page_size, 0, bytes_of(page)}};
  }
  registrar_->submit([filling = filling_.get()] { filling->register_pieces(); });
}

PinnedTier::~PinnedTier() {
  if (!in_owner_process()) {
    static_cast<void>(fill_.release());  // it keeps what its threads may have locked
    return;
  }
  filling_->stop();
  fill_->cancel();
  registrar_.reset();
}

void PinnedTier::write(std::size_t offset, const void* source, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes > 0) std::memcpy(address() + offset, source, nbytes);
}

bool PinnedTier::wait_for(milliseconds limit) {
  const auto end = steady_clock::now() + at_most_a_year(limit);
  bool registered = false;
  try {
    registered = filling_->wait_for(filling_->piece_count(), end);
  } catch (...) {
    fill_->cancel();
    throw;
  }
  const auto left = std::chrono::duration_cast<milliseconds>(end - steady_clock::now());
  const bool filled = fill_->wait_for(std::max(left, milliseconds(0)));
  return registered && filled;
}

void PinnedTier::wait_until_there(std::size_t end) {
  const std::size_t pieces = filling_->pieces_up_to(end);
  if (filling_->wait_for(pieces, steady_clock::now())) return;
  require_owner_process();
  const milliseconds forever = milliseconds::max();
  if (filling_->wait_for(pieces, steady_clock::now() + at_most_a_year(forever))) return;
  fill_->wait_for(forever);
  throw Error("the host tier was not filled: its reading was stopped");
}

bool PinnedTier::ready(PageIndex page) {
  check_page(page);
  const std::size_t end = page * page_size() + bytes_of(page);
  return filling_->wait_for(filling_->pieces_up_to(end), steady_clock::now());
}

const std::vector<Piece>& PinnedTier::fetch(PageIndex page) {
  check_page(page);
  wait_until_there(page * page_size() + bytes_of(page));
  return pages_[page];
}

void PinnedTier::read(std::size_t offset, void* target, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  wait_until_there(offset + nbytes);
  std::memcpy(target, address() + offset, nbytes);
}

std::byte* PinnedTier::address() noexcept {
  return filling_->slab().address();
}

HostTierStats PinnedTier::stats() const {
  HostTierStats stats;
  stats.pinned_bytes = filling_->slab().registered_bytes();
  stats.read_bytes = fill_->done_bytes();
  return stats;
}

std::size_t PinnedTier::pages_together(PageIndex first) const {
  // A copy stays within what was registered at once.
  const std::size_t start = std::size_t{first} * page_size();
  const std::size_t end = (start / filling_->piece_size() + 1) * filling_->piece_size();
  return (std::min(end, page_count() * page_size()) - start) / page_size();
}

}  // namespace penstock
