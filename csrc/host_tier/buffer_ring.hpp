// A ring of pinned buffers that pages of files are read into ahead of their use, by several
// threads. The pages to be read next are those that come first in the expected order; the buffer to
// be reused is the one whose page is needed last. So a page that comes again soon, or fits, is not
// read again, and no page has to be given up in a fixed order. Readers share a page, read by read,
// so that the page that is needed first is there first.
//
// A buffer is empty, reading or full. A full one is in use from `fetch` to `release`, and copied
// from until the event given to `release`; then another page may take it. A thread of its own asks
// for the events, again and again and in no order: they may be of several streams, and nobody that
// reads or fetches waits for them. A page that is fetched but not on its
// way is a demand: it goes before all others. A failed read ahead is forgotten until the page is
// fetched, which reads it anew and throws what that throws.
//
// Memory: one slab, registered buffer by buffer when each is first used. Threads: fetch, release
// and expect by one thread at a time; all else from anywhere. Must not be destroyed in a forked
// child.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device/handles.hpp"
#include "host_tier/open_source.hpp"
#include "host_tier/page_layout.hpp"
#include "host_tier/read_order.hpp"
#include "host_tier/slab.hpp"
#include "threading/task_thread.hpp"

namespace penstock {

class BufferRing {
 public:
  /// @param source        Outlives the ring.
  /// @param layouts       By page; a page without reads is never in the ring.
  /// @param count         Buffers, at least 2.
  /// @param buffer_bytes  Enough for every layout; a multiple of the system page.
  /// @throws DeviceError where there is no such memory.
  BufferRing(std::shared_ptr<Device> device, const OpenSource& source,
             std::vector<PageLayout> layouts, std::size_t count, std::size_t buffer_bytes,
             std::size_t threads);
  /// Ends after the reads under way; by then all copies are over.
  ~BufferRing();
  BufferRing(const BufferRing&) = delete;
  BufferRing& operator=(const BufferRing&) = delete;

  const PageLayout& layout(PageIndex page) const { return layouts_.at(page); }

  void expect(const std::vector<PageIndex>& order);
  bool ready(PageIndex page);
  /// The buffer that holds the page, until it is released.
  /// @throws CheckpointError, DeviceError where reading failed, ScheduleError where all buffers
  /// hold pages that are fetched and not released.
  std::byte* fetch(PageIndex page);
  /// @throws ScheduleError for a page that is not fetched.
  void release(PageIndex page, std::shared_ptr<OwnedEvent> copied);

  std::size_t pinned_bytes() const { return slab_.registered_bytes(); }
  std::uint64_t read_bytes() const noexcept { return read_bytes_; }

 private:
  enum class State : std::uint8_t { kEmpty, kReading, kFull };
  struct Buffer {
    std::byte* address = nullptr;
    bool registered = false;
    State state = State::kEmpty;
    PageIndex page = 0;
    std::size_t users = 0;   // fetches without release
    std::size_t copies = 0;  // releases whose event is not over
    std::size_t next = 0;    // the read that nobody has taken yet
    std::size_t under_way = 0;
    std::uint64_t used = 0;  // number of its last fetch
    bool demanded = false;   // fetch waits for it, and has it for itself when it is full
    std::exception_ptr error;
    bool idle() const noexcept {
      return state != State::kReading && users == 0 && copies == 0 && !demanded;
    }
  };
  struct Copy {
    Buffer* buffer;
    std::shared_ptr<OwnedEvent> event;
    int failures = 0;  // of asking
  };

  void close();
  void run_reader();
  bool start_page(std::unique_lock<std::mutex>& lock);
  bool read_some(std::unique_lock<std::mutex>& lock);
  void finish(Buffer& buffer);
  std::optional<PageIndex> next_expected() const;
  Buffer* find(PageIndex page);
  Buffer* victim(StepTime needed_at);
  bool all_in_use() const;
  void watch_copies();
  bool over(Copy& copy);

  std::shared_ptr<Device> device_;
  const OpenSource& source_;
  std::vector<PageLayout> layouts_;
  Slab slab_;
  std::size_t buffer_bytes_;
  std::atomic<std::uint64_t> read_bytes_{0};

  std::mutex mutex_;
  std::condition_variable work_;     // for readers
  std::condition_variable arrived_;  // for fetch
  std::condition_variable copying_;  // for the thread that asks for events
  std::vector<Buffer> buffers_;
  std::vector<Buffer*> buffer_of_;  // by page; null for one that is in no buffer
  std::vector<bool> failed_;        // by page: not to be read ahead
  ReadOrder order_;
  std::uint64_t fetches_ = 0;
  bool closing_ = false;
  std::optional<PageIndex> demand_;  // fetched, and in no buffer yet
  std::exception_ptr demand_error_;
  std::exception_ptr broken_;  // of an event that cannot be asked for

  std::vector<Copy> copies_;  // under way, and not yet known to the thread
  TaskThread watcher_{TaskThread::AtEnd::kDrop};
  std::vector<std::unique_ptr<TaskThread>> readers_;
};

}  // namespace penstock
