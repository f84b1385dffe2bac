// A host tier is where one model's bytes wait before they are copied to the device: in pinned host
// memory (PinnedTier), in the page cache (MappedTier), or on disk behind a pinned ring of buffers
// (StreamTier). It hands them out page by page as pieces that the device can copy at full rate.
//
// Use: it starts to read when it is made; `write` puts bytes in place that no file has; `wait_for`
// says when pages can be fetched. Then, for each load, `fetch`, copies from the pieces, `release`.
// The owner sees to it that no copy is under way when the tier goes. Threads: `wait_for`, `ready`,
// `read` and the figures are thread-safe; fetch, release and expect are called by one thread at a
// time. Waits end in an error if the reading behind them failed.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device/handles.hpp"
#include "io/fill_job.hpp"
#include "schedule/schedule.hpp"

namespace penstock {

/// Bytes of a page that lie together in host memory. Where that is a mapping of a file, the host
/// must not touch it: it reads the file.
struct Piece {
  const std::byte* source;
  std::size_t offset;  ///< In the page.
  std::size_t nbytes;
  const File* file = nullptr;  ///< The file that is mapped there.
  std::uint64_t file_offset = 0;
};

/// Where a model's bytes are: extents of files, ascending by region offset, not overlapping.
struct Source {
  std::vector<std::string> paths;
  std::vector<Extent> extents;
};

/// What a tier holds and has done, in bytes.
struct HostTierStats {
  std::size_t pinned_bytes = 0;  ///< Host memory of its own that is fixed in place.
  std::size_t mapped_bytes = 0;  ///< Page cache that it has registered.
  std::uint64_t read_bytes = 0;  ///< Read from files so far.
};

class HostTier {
 public:
  virtual ~HostTier() = default;
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;

  /// "pinned", "mapped" or "stream".
  virtual std::string kind() const = 0;
  std::size_t nbytes() const noexcept { return nbytes_; }
  std::size_t page_size() const noexcept { return page_size_; }
  std::size_t page_count() const noexcept { return (nbytes_ + page_size_ - 1) / page_size_; }

  /// Puts bytes in place that no extent covers; before the first fetch.
  /// @throws std::out_of_range outside the tier.
  virtual void write(std::size_t offset, const void* source, std::size_t nbytes) = 0;

  /// @return whether pages can be fetched. @throws the first error of a reader.
  virtual bool wait_for(std::chrono::milliseconds limit) = 0;
  virtual std::size_t total_bytes()
      const noexcept = 0;  ///< To be read before pages can be fetched.
  virtual std::size_t done_bytes() const noexcept = 0;

  /// Says which pages will be fetched, in order, over and over. Others can be fetched all the same.
  virtual void expect(std::vector<PageIndex> order) = 0;
  /// Whether `fetch` would return at once.
  virtual bool ready(PageIndex page) = 0;
  /// How many pages from this one on lie together in memory that one copy may read; at least 1.
  virtual std::size_t pages_together(PageIndex /*first*/) const { return 1; }
  /// The page's bytes, ascending by offset, valid until `release`. Blocks while they are read.
  /// Bytes that nobody gave are in no piece. @throws CheckpointError where reading failed, or a
  /// file that has some of the bytes was changed since it was opened.
  virtual const std::vector<Piece>& fetch(PageIndex page) = 0;
  /// The copies from the fetched page end with the event.
  virtual void release(PageIndex page, std::shared_ptr<OwnedEvent> copied) = 0;

  /// Before pages are copied that were fetched long ago, as in a graph.
  /// @throws CheckpointError where a file was changed that pages are still read from.
  virtual void require_unchanged() {}
  /// Compares a page that was loaded with what it was when it was loaded first, by checksum, where
  /// pages are read from files again and again. @throws CheckpointError where it differs.
  virtual void verify(PageIndex /*page*/, const std::byte* /*bytes*/) {}

  /// Copies bytes out. @throws std::out_of_range outside the tier, CheckpointError.
  virtual void read(std::size_t offset, void* target, std::size_t nbytes) = 0;
  /// First byte, where host memory of our own holds all bytes in order, so that they can be read
  /// and changed there; null elsewhere.
  virtual std::byte* address() noexcept { return nullptr; }

  virtual HostTierStats stats() const = 0;

 protected:
  /// @throws std::invalid_argument for a page size that is no multiple of the system's.
  HostTier(std::size_t nbytes, std::size_t page_size);

  /// @throws std::out_of_range where [offset, offset + nbytes) leaves the tier.
  void check_range(std::size_t offset, std::size_t nbytes) const;
  /// @throws std::out_of_range for a page that does not exist.
  void check_page(PageIndex page) const;
  std::size_t bytes_of(PageIndex page) const;  ///< The last page can be shorter.

  /// Threads do not survive a fork: a child must neither wait for them nor join them.
  bool in_owner_process() const noexcept;
  /// @throws Error in a forked child.
  void require_owner_process() const;

 private:
  std::size_t nbytes_;
  std::size_t page_size_;
  pid_t owner_;
};

/// Readers that a tier has unless told: enough to saturate the page cache and any disk.
std::size_t default_readers() noexcept;

}  // namespace penstock
