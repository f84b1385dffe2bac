// The stream tier is for models larger than memory: the bytes stay in their files, and a ring of
// pinned buffers is read ahead of what is fetched (BufferRing). It is ready at once, holds no more
// than the ring, and is as fast as the disk.
#pragma once

#include <memory>
#include <vector>

#include "device/device.hpp"
#include "host_tier/buffer_ring.hpp"
#include "host_tier/checksums.hpp"
#include "host_tier/host_tier.hpp"
#include "host_tier/open_source.hpp"
#include "host_tier/overlay.hpp"

namespace penstock {

class StreamTier final : public HostTier {
 public:
  /// @param ring_bytes  Host memory for buffers; two pages at least. A buffer is a page and some
  ///                    bytes for alignment, so the ring can be two such buffers where that is
  ///                    more.
  /// @param threads     Readers; 0 for 8, which keep a fast disk busy on any number of cores.
  /// @throws as OpenSource does, std::invalid_argument for a smaller ring, DeviceError where there
  ///         is no such memory.
  StreamTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
             const Source& source, std::size_t ring_bytes, std::size_t threads = 0);
  /// Ends after the reads under way.
  ~StreamTier() override;

  std::string kind() const override { return "stream"; }
  /// @throws std::invalid_argument where a file has some of the bytes.
  void write(std::size_t offset, const void* source, std::size_t nbytes) override;
  bool wait_for(std::chrono::milliseconds /*limit*/) override { return true; }
  std::size_t total_bytes() const noexcept override { return 0; }
  std::size_t done_bytes() const noexcept override { return 0; }
  void expect(std::vector<PageIndex> order) override;
  bool ready(PageIndex page) override;
  /// @throws ScheduleError where all buffers hold pages that are fetched and not released.
  const std::vector<Piece>& fetch(PageIndex page) override;
  void release(PageIndex page, std::shared_ptr<OwnedEvent> copied) override;
  void read(std::size_t offset, void* target, std::size_t nbytes) override;
  void require_unchanged() override { source_.require_unchanged(0, nbytes()); }
  void verify(PageIndex page, const std::byte* bytes) override;
  HostTierStats stats() const override;

 private:
  OpenSource source_;
  Overlay overlay_;
  Checksums sums_;
  std::vector<std::vector<Piece>> pages_;  // as fetched last
  std::unique_ptr<BufferRing> ring_;
};

}  // namespace penstock
