// A region of frames on the host device, its parts in reach, and readers that look at their bytes
// late, on a stream, so that a copy that does not wait for them is seen.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "device/handles.hpp"
#include "device/testing/faulty_device.hpp"
#include "frames/frames_region.hpp"
#include "support/fake_tier.hpp"
#include "support/files.hpp"
#include "support/pager_setup.hpp"
#include "support/spying_device.hpp"

namespace penstock::testing {

struct FramesSetup {
  /// @param missing  Bytes by which the last page is shorter.
  FramesSetup(std::size_t cap_pages, std::size_t page_count, std::size_t missing = 0)
      : bytes(pattern(page_count * kPage - missing, page_count)),
        budget(std::make_shared<Budget>(cap_pages * kPage)),
        pool(FramePool::create(device, budget, kPage)),
        tier(std::make_shared<FakeTier>(bytes, kPage)),
        region(FramesRegion::create(pool, tier)) {}

  std::size_t used_pages() const { return budget->stats().used / kPage; }
  std::uint64_t loads() const { return region->frames_stats().loaded_bytes / kPage; }

  Bytes bytes;
  std::shared_ptr<SpyingDevice> spy = std::make_shared<SpyingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(spy);
  std::vector<std::unique_ptr<OwnedStream>> streams;  // they outlive the region
  std::shared_ptr<Budget> budget;
  std::shared_ptr<FramePool> pool;
  std::shared_ptr<FakeTier> tier;
  std::shared_ptr<FramesRegion> region;
};

/// A stream that reads pages: it lives as long as the setup, since a region may ask any stream that
/// has read a page where it has got to, as long as the page is mapped.
class ReaderStream {
 public:
  explicit ReaderStream(FramesSetup& setup)
      : handle_(setup.streams.emplace_back(std::make_unique<OwnedStream>(setup.spy))->get()) {}
  StreamHandle get() const noexcept { return handle_; }

 private:
  StreamHandle handle_;
};

/// The first `own` pages on frames of their own, the others around a ring.
inline Arrangement arranged(std::size_t page_count, std::size_t own, std::size_t ring) {
  Arrangement arrangement;
  arrangement.ring = ring;
  arrangement.slot.assign(page_count, Arrangement::kOwnFrame);
  for (std::size_t page = own; page < page_count; ++page) {
    arrangement.slot[page] = static_cast<std::uint32_t>((page - own) % ring);
  }
  return arrangement;
}

/// Whether a page of the region holds its bytes.
inline bool right_now(const Region& region, const Bytes& bytes, PageIndex page) {
  const std::size_t start = std::size_t{page} * region.page_size();
  const std::size_t nbytes = std::min(region.page_size(), bytes.size() - start);
  return std::memcmp(region.address() + start, bytes.data() + start, nbytes) == 0;
}

/// Counts the pages that were wrong when a stream came to look at them.
class LateLook {
 public:
  explicit LateLook(const Bytes& bytes) : bytes_(bytes) {}

  /// Looks at pages as work of the stream, some time after it has come to that.
  void look(const Region& region, const Pages& pages, StreamHandle stream,
            std::chrono::microseconds delay = {}) {
    const auto task = [this, &region, pages, delay] {
      if (delay.count() > 0) std::this_thread::sleep_for(delay);
      for (const PageIndex page : pages) {
        ++looks_;
        if (!right_now(region, bytes_, page)) ++wrong_;
      }
    };
    if (stream.value == nullptr) {
      task();
    } else {
      run_on(stream, task);
    }
  }
  int wrong() const { return wrong_; }
  int looks() const { return looks_; }

 private:
  const Bytes& bytes_;
  std::atomic<int> wrong_{0};
  std::atomic<int> looks_{0};
};

/// One step on the calling thread. @return whether all bytes were right.
inline bool reads_right(FramesSetup& setup, const Pages& pages) {
  LateLook look(setup.bytes);
  setup.region->begin(pages, kCaller);
  look.look(*setup.region, pages, kCaller);
  setup.region->end(pages, kCaller);
  return look.wrong() == 0;
}

}  // namespace penstock::testing
