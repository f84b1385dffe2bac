// An allocator on the host device, its parts in reach, and users of its memory that write a pattern
// as work of a stream, late, and look whether it is still there when they are done.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <thread>

#include "allocator/caching_allocator.hpp"
#include "device/handles.hpp"
#include "device/testing/faulty_device.hpp"
#include "support/spying_device.hpp"

namespace penstock::testing {

inline constexpr std::size_t kFrame = std::size_t{2} << 20;
inline constexpr std::size_t kMiB = std::size_t{1} << 20;
inline constexpr StreamHandle kHere{};  ///< The calling thread's own order of work.

/// A host device of which tests say which streams capture, and that notices when an event is
/// recorded there all the same.
class CapturingDevice : public SpyingDevice {
 public:
  void set_capturing(StreamHandle stream, bool capturing) {
    const std::lock_guard lock(mutex_);
    if (capturing) {
      streams_.insert(stream.value);
    } else {
      streams_.erase(stream.value);
    }
  }
  bool stream_capturing(StreamHandle stream) override {
    const std::lock_guard lock(mutex_);
    return streams_.count(stream.value) > 0;
  }
  void event_record(EventHandle event, StreamHandle stream) override {
    EXPECT_FALSE(stream_capturing(stream)) << "an event became part of a graph";
    SpyingDevice::event_record(event, stream);
  }
  void synchronize() override {
    {
      const std::lock_guard lock(mutex_);
      EXPECT_TRUE(streams_.empty()) << "not allowed while a stream captures";
    }
    SpyingDevice::synchronize();
  }

 private:
  std::mutex mutex_;
  std::set<void*> streams_;
};

struct AllocatorSetup {
  explicit AllocatorSetup(std::size_t cap_frames, AllocatorOptions options = small_arenas(),
                          std::size_t frame_size = kFrame)
      : budget(std::make_shared<Budget>(cap_frames * frame_size)),
        pool(FramePool::create(device, budget, frame_size)),
        allocator(CachingAllocator::create(pool, options)) {}

  static AllocatorOptions small_arenas() { return {32 * kFrame, 64 * kFrame}; }

  std::size_t used_frames() const { return budget->stats().used / pool->frame_size(); }
  /// Whether the ledger, the device and the allocator agree on how many frames there are.
  bool balanced() const {
    const auto charged = budget->stats().used_by_tag.at(1) / pool->frame_size();
    const AllocatorStats stats = allocator->stats();
    const SideStats& all = stats.side(Side::kAll);
    return static_cast<std::size_t>(spy->frames()) == charged &&
           static_cast<std::size_t>(all.segment.current) == charged &&
           static_cast<std::size_t>(all.reserved_bytes.current) == charged * pool->frame_size() &&
           all.active_bytes.current <= all.reserved_bytes.current;
  }
  void* take(std::size_t nbytes, StreamHandle stream = kHere) const {
    return allocator->allocate(nbytes, stream);
  }

  std::shared_ptr<CapturingDevice> spy = std::make_shared<CapturingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(spy);
  std::shared_ptr<Budget> budget;
  std::shared_ptr<FramePool> pool;
  std::shared_ptr<CachingAllocator> allocator;
};

/// Writes into memory as work of streams, and counts where somebody else changed it between the
/// start and the end of that work.
class LateWriter {
 public:
  void write(void* address, std::size_t nbytes, StreamHandle stream,
             std::chrono::microseconds duration = {}) {
    const auto seed = static_cast<unsigned char>(++seeds_);
    const auto task = [this, address, nbytes, seed, duration] {
      std::memset(address, seed, nbytes);
      if (duration.count() > 0) std::this_thread::sleep_for(duration);
      const auto* bytes = static_cast<const unsigned char*>(address);
      if (bytes[0] != seed || std::memcmp(bytes, bytes + 1, nbytes - 1) != 0) ++wrong_;
    };
    if (stream.value == nullptr) {
      task();
    } else {
      run_on(stream, task);
    }
  }
  std::size_t wrong() const { return wrong_; }

 private:
  std::atomic<unsigned> seeds_{0};
  std::atomic<std::size_t> wrong_{0};
};

}  // namespace penstock::testing
