// The mapped tier copies nothing into memory of its own: the files are mapped, shared and
// read-only, what is needed of them is brought into the page cache, and the device registers it
// there and copies from it at full rate. It needs as much memory as the pinned tier, but shares it
// with other processes and with the next start.
//
// It is opt-in. Some systems refuse to register mappings of files, and with some the call has been
// seen never to return. So registering runs on a thread of its own and each call has a time limit;
// past it the tier gives up with an error and leaves the thread behind, with its own hold on all
// that it uses.
//
// A file should not change while it is mapped. Each fetch looks whether one did, and refuses.
// Between that look and the copy it may still happen. Touching a mapping of what a file has no more
// ends the process; so the process never does: the device copies from memory that is registered,
// and what the host copies, it reads from the file.
//
// Each run of needed bytes of a file is one registration, however long: a page's bytes then never
// lie in two of them, which one copy must not span.
#pragma once

#include <memory>
#include <thread>
#include <vector>

#include "device/device.hpp"
#include "host_tier/checksums.hpp"
#include "host_tier/host_tier.hpp"
#include "host_tier/open_source.hpp"
#include "host_tier/overlay.hpp"

namespace penstock {

class MappedTier final : public HostTier {
 public:
  /// Starts to bring the files into the page cache.
  /// @param limit    How long one call that registers may take.
  /// @param threads  Readers; 0 for as many as are useful.
  /// @throws as OpenSource does, DeviceError where a file cannot be mapped.
  MappedTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
             const Source& source, std::chrono::milliseconds limit, std::size_t threads = 0);
  /// Waits for a call that registers, up to its limit.
  ~MappedTier() override;

  std::string kind() const override { return "mapped"; }
  /// @throws std::invalid_argument where a file has some of the bytes.
  void write(std::size_t offset, const void* source, std::size_t nbytes) override;
  /// @throws DeviceError where registering was refused or takes too long.
  bool wait_for(std::chrono::milliseconds limit) override;
  std::size_t total_bytes() const noexcept override;
  std::size_t done_bytes() const noexcept override;
  void expect(std::vector<PageIndex> /*order*/) override {}
  bool ready(PageIndex page) override;
  const std::vector<Piece>& fetch(PageIndex page) override;
  void release(PageIndex /*page*/, std::shared_ptr<OwnedEvent> /*copied*/) override {}
  void read(std::size_t offset, void* target, std::size_t nbytes) override;
  void require_unchanged() override { source_->require_unchanged(0, nbytes()); }
  void verify(PageIndex page, const std::byte* bytes) override;
  HostTierStats stats() const override;

 private:
  class Mappings;
  struct Registering;
  std::vector<Piece> find_pieces(PageIndex page) const;

  std::shared_ptr<const OpenSource> source_;
  Overlay overlay_;
  Checksums sums_;
  std::vector<std::vector<Piece>> pages_;
  std::vector<bool> known_;  // by page: whether its pieces were found
  std::shared_ptr<Mappings> mappings_;
  std::shared_ptr<Registering> registering_;
  std::thread thread_;
};

}  // namespace penstock
