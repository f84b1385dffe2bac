// A fill job reads extents of files into a target, straight to their final place, on several
// threads, and never makes a page resident. It starts at once; the caller waits for it, watches its
// progress, or cancels it. The first error stops all threads and is thrown by `wait_for`. The job
// keeps files and target alive. All functions are thread-safe.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/file.hpp"
#include "io/fill_target.hpp"

namespace penstock {

/// `nbytes` bytes at `file_offset` of file `file` belong at `region_offset`.
struct Extent {
  std::size_t file;
  std::uint64_t file_offset;
  std::size_t region_offset;
  std::size_t nbytes;
};

class FillJob {
 public:
  /// @param paths    Files that the extents count from zero.
  /// @param threads  Readers, at least 1.
  /// @param cache    Whether what is read stays in the page cache.
  /// @throws CheckpointError for a file that cannot be opened or is too short,
  ///         std::out_of_range for an extent outside the target.
  FillJob(std::shared_ptr<FillTarget> target, const std::vector<std::string>& paths,
          const std::vector<Extent>& extents, std::size_t threads,
          PageCache cache = PageCache::kSpare);
  /// Cancels, and waits for the reads under way.
  ~FillJob();
  FillJob(const FillJob&) = delete;
  FillJob& operator=(const FillJob&) = delete;

  /// @return whether all bytes are in place. @throws the first error of a reader; CheckpointError
  /// also for a file that was changed meanwhile.
  bool wait_for(std::chrono::milliseconds limit);
  /// Makes the readers stop after the piece at hand. `wait_for` then never returns true.
  void cancel() noexcept;
  std::size_t total_bytes() const noexcept { return total_; }
  std::size_t done_bytes() const noexcept { return done_.load(); }

 private:
  void read_pieces();
  void join() noexcept;

  std::shared_ptr<FillTarget> target_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<Extent> pieces_;
  std::size_t total_ = 0;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> done_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable finished_;
  std::size_t running_ = 0;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace penstock
