#include "io/fill_job.hpp"

#include <algorithm>
#include <stdexcept>

#include "error/error.hpp"
#include "threading/time_limit.hpp"

namespace penstock {

namespace {

constexpr std::size_t kPiece = std::size_t{16} << 20;  // one read call; keeps all threads busy

void check_extent(const Extent& extent, const FillTarget& target,
                  const std::vector<std::unique_ptr<File>>& files) {
  target.check_range(extent.region_offset, extent.nbytes);
  const File& file = *files.at(extent.file);
  if (extent.file_offset > file.size() || extent.nbytes > file.size() - extent.file_offset) {
    throw CheckpointError(file.path() + " has " + std::to_string(file.size()) +
                              " bytes, but bytes [" + std::to_string(extent.file_offset) + ", " +
                              std::to_string(extent.file_offset + extent.nbytes) +
                              ") are needed: was it truncated?",
                          file.path(), extent.file_offset);
  }
}

}  // namespace

FillJob::FillJob(std::shared_ptr<FillTarget> target, const std::vector<std::string>& paths,
                 const std::vector<Extent>& extents, std::size_t threads, PageCache cache)
    : target_(std::move(target)) {
  for (const auto& path : paths) files_.push_back(std::make_unique<File>(path, cache));
  for (const auto& extent : extents) {
    check_extent(extent, *target_, files_);
    for (std::size_t at = 0; at < extent.nbytes; at += kPiece) {
      pieces_.push_back({extent.file, extent.file_offset + at, extent.region_offset + at,
                         std::min(kPiece, extent.nbytes - at)});
    }
    total_ += extent.nbytes;
  }
  running_ = std::max<std::size_t>(1, std::min(threads, pieces_.size()));
  const std::size_t wanted = running_;
  threads_.reserve(wanted);
  // They begin together: beside readers that touch memory for the first time, making another thread
  // takes milliseconds.
  std::unique_lock lock(mutex_);
  try {
    while (threads_.size() < wanted) threads_.emplace_back([this] { read_pieces(); });
  } catch (...) {
    lock.unlock();
    join();
    throw;
  }
}

FillJob::~FillJob() {
  join();
}

void FillJob::join() noexcept {
  cancel();
  for (auto& thread : threads_) thread.join();
}

void FillJob::cancel() noexcept {
  stop_ = true;
}

void FillJob::read_pieces() {
  {
    const std::lock_guard lock(mutex_);
  }  // until all threads are there
  std::exception_ptr error;
  try {
    for (std::size_t i = next_++; i < pieces_.size() && !stop_; i = next_++) {
      const Extent& piece = pieces_[i];
      target_->fill_from(*files_[piece.file], piece.file_offset, piece.region_offset, piece.nbytes);
      done_ += piece.nbytes;
    }
  } catch (...) {
    error = std::current_exception();
    stop_ = true;
  }
  {
    const std::lock_guard lock(mutex_);
    --running_;
    if (error && !error_) error_ = error;
  }
  finished_.notify_all();
}

bool FillJob::wait_for(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  const bool ended = finished_.wait_for(lock, at_most_a_year(limit), [&] { return running_ == 0; });
  if (ended && error_) std::rethrow_exception(error_);
  return ended && done_ == total_;
}

}  // namespace penstock
