// The pinned tier keeps a whole model in host memory of its own: one packed slab that the files are
// read into, in parallel, and that the device copies from at full rate. Its bytes can be read and
// changed in place.
//
// Filling and registering overlap. Registering memory that is there costs a quarter of reading it,
// but registering untouched memory makes one thread clear it first, slower than the readers read.
// So the registering thread follows the readers: it takes the slab in order, piece by piece (a
// multiple of the page size, so no page lies in two registrations), each as soon as its bytes have
// arrived. A page can be fetched once its piece is registered, before the rest is there. It begins
// when somebody waits or asks for pages: who writes the bytes himself, piece by piece, giving up
// where they came from, has the slab grow with them.
#pragma once

#include <memory>
#include <vector>

#include "device/device.hpp"
#include "host_tier/host_tier.hpp"
#include "threading/task_thread.hpp"

namespace penstock {

class PinnedTier final : public HostTier {
 public:
  /// Starts to fill.
  /// @param threads  Readers; 0 for as many as are useful.
  /// @param cache    Whether what is read stays in the page cache.
  /// @throws CheckpointError for a file that cannot be opened or is too short, std::out_of_range
  ///         for an extent outside the tier, DeviceError where there is no such memory.
  PinnedTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
             const Source& source, std::size_t threads = 0, PageCache cache = PageCache::kSpare);
  /// Stops the filling after the reads under way.
  ~PinnedTier() override;

  std::string kind() const override { return "pinned"; }
  /// As in the interface, and at any time: it writes into the slab.
  void write(std::size_t offset, const void* source, std::size_t nbytes) override;
  bool wait_for(std::chrono::milliseconds limit) override;
  std::size_t total_bytes() const noexcept override { return fill_->total_bytes(); }
  std::size_t done_bytes() const noexcept override { return fill_->done_bytes(); }
  void expect(std::vector<PageIndex> /*order*/) override {}
  std::size_t pages_together(PageIndex first) const override;
  bool ready(PageIndex page) override;
  const std::vector<Piece>& fetch(PageIndex page) override;
  void release(PageIndex /*page*/, std::shared_ptr<OwnedEvent> /*copied*/) override {}
  void read(std::size_t offset, void* target, std::size_t nbytes) override;
  std::byte* address() noexcept override;
  HostTierStats stats() const override;

 private:
  class Filling;
  void wait_until_there(std::size_t end);

  std::vector<std::vector<Piece>> pages_;
  std::shared_ptr<Filling> filling_;
  std::unique_ptr<FillJob> fill_;
  std::unique_ptr<TaskThread> registrar_;
};

}  // namespace penstock
