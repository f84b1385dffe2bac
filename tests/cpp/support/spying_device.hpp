// The host device under observation: what is asked to be resident is written down, and frames are
// counted; tests can run work of their own on a stream, hold calls back, and make a load fail late,
// on its stream, the way a broken link or a disk error shows. Hooks are set before other threads
// use the device.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "device/host/host_device.hpp"
#include "device/host/host_stream.hpp"
#include "error/error.hpp"

namespace penstock::testing {

/// Runs `task` as work of a stream of the host device.
inline void run_on(StreamHandle stream, std::function<void()> task) {
  static_cast<HostStream*>(stream.value)->submit(std::move(task));
}

class SpyingDevice : public HostDevice {
 public:
  using Hook = std::function<void(std::uintptr_t address, std::size_t nbytes, StreamHandle)>;
  Hook on_prefetch;  ///< Before each managed_prefetch, on the thread that calls it.
  Hook on_evict;     ///< Before each managed_evict, on the thread that calls it.
  Hook on_keep;      ///< Before each managed_keep.
  Hook on_read;      ///< Before each managed_read; it has no stream.
  Hook on_release;   ///< Before each managed_release; it has no stream.
  Hook on_copy;      ///< Before each copy, on the thread that calls it; tells the target.
  Hook after_copy;   ///< The same, after the copy was given to its stream.

  std::atomic<void*> captured_stream{nullptr};  ///< A stream that is said to be captured.

  /// Makes the next `count` prefetches or copies fail on their stream, after the call has returned.
  void fail_late(int count) { late_failures_ = count; }

  /// Frames that exist, and the most that did at once.
  int frames() const { return frames_; }
  int most_frames() const { return most_frames_; }

  /// Most bytes that were resident or on their way at once, as the calls tell.
  std::size_t peak() const {
    const std::lock_guard lock(mutex_);
    return peak_;
  }
  std::size_t held() const {
    const std::lock_guard lock(mutex_);
    return held_;
  }

  bool stream_capturing(StreamHandle stream) override {
    return stream.value != nullptr && stream.value == captured_stream;
  }

  void managed_read(void* address, const File& file, std::uint64_t offset,
                    std::size_t nbytes) override {
    if (on_read) on_read(reinterpret_cast<std::uintptr_t>(address), nbytes, {});
    HostDevice::managed_read(address, file, offset, nbytes);
  }

  void managed_keep(void* address, std::size_t nbytes, StreamHandle stream) override {
    if (on_keep) on_keep(reinterpret_cast<std::uintptr_t>(address), nbytes, stream);
    HostDevice::managed_keep(address, nbytes, stream);
  }

  void managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) override {
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    if (on_prefetch) on_prefetch(start, nbytes, stream);
    {
      const std::lock_guard lock(mutex_);
      if (ranges_.emplace(start, nbytes).second) held_ += nbytes;
      peak_ = std::max(peak_, held_);
    }
    if (fails_late()) address = reinterpret_cast<void*>(kNeverMapped);
    HostDevice::managed_prefetch(address, nbytes, stream);
  }

  void managed_evict(void* address, std::size_t nbytes, Access access,
                     StreamHandle stream) override {
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    if (on_evict) on_evict(start, nbytes, stream);
    HostDevice::managed_evict(address, nbytes, access, stream);
    run_on(stream, [this, start, nbytes] {  // only now the bytes are gone
      const std::lock_guard lock(mutex_);
      forget(start, nbytes);
    });
  }

  void managed_release(void* address, std::size_t nbytes) override {
    const auto start = reinterpret_cast<std::uintptr_t>(address);
    if (on_release) on_release(start, nbytes, {});
    {
      const std::lock_guard lock(mutex_);
      forget(start, nbytes);
    }
    HostDevice::managed_release(address, nbytes);
  }

  FrameHandle frame_create(std::size_t nbytes) override {
    const FrameHandle frame = HostDevice::frame_create(nbytes);
    const int now = ++frames_;
    for (int most = most_frames_; most < now && !most_frames_.compare_exchange_weak(most, now);) {
    }
    return frame;
  }

  void frame_release(FrameHandle frame) override {
    HostDevice::frame_release(frame);
    --frames_;
  }

  void copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) override {
    const auto start = reinterpret_cast<std::uintptr_t>(target);
    if (on_copy) on_copy(start, nbytes, stream);
    if (fails_late()) {
      run_on(stream, [] { throw DeviceError("copy", 5, "the link broke"); });
    } else {
      HostDevice::copy(target, source, nbytes, stream);
    }
    if (after_copy) after_copy(start, nbytes, stream);
  }

 private:
  bool fails_late() { return late_failures_.load() > 0 && late_failures_.fetch_sub(1) > 0; }

  static constexpr std::uintptr_t kNeverMapped = 4096;  // below the system's lowest address

  // Cuts [start, start + nbytes) out of what is held.
  void forget(std::uintptr_t start, std::size_t nbytes) {
    const std::uintptr_t end = start + nbytes;
    auto at = ranges_.upper_bound(start);
    if (at != ranges_.begin()) --at;
    while (at != ranges_.end() && at->first < end) {
      const auto [first, size] = *at;
      const std::uintptr_t last = first + size;
      if (last <= start) {
        ++at;
        continue;
      }
      at = ranges_.erase(at);
      held_ -= size;
      if (first < start) held_ += ranges_.emplace(first, start - first).first->second;
      if (last > end) held_ += ranges_.emplace(end, last - end).first->second;
    }
  }

  std::atomic<int> late_failures_{0};
  std::atomic<int> frames_{0};
  std::atomic<int> most_frames_{0};
  mutable std::mutex mutex_;
  std::map<std::uintptr_t, std::size_t> ranges_;  // by start; they do not overlap
  std::size_t held_ = 0;
  std::size_t peak_ = 0;
};

}  // namespace penstock::testing
