// The device that is a GPU: every CUDA call of the project is here or in cuda_api, and each is
// checked. It works in the device's primary context, the one that PyTorch uses, so streams and
// addresses are shared with it; each call selects its GPU for the calling thread and puts the
// thread's own choice back. Thread-safe.
//
// Managed memory prefers the host and is, where it is read-mostly, duplicated on the GPU by a
// prefetch. Taking the advice back and giving it again drops the duplicates and moves nothing; the
// call is synchronous. Read-write memory has no duplicates: evicting moves it to the host.
//
// The GPU fills managed memory, by copies from pinned buffers to where it is on the host. Where the
// process has never touched a page, the driver knows that nothing else maps it, and a prefetch
// takes the host a third of the time that it takes otherwise (4 KiB by 4 KiB, what each may be
// mapped for). Such a duplicate can be written to, and the driver does not see it: hence
// `managed_keep`.
#pragma once

#include <string>

#include "device/cuda/cuda_usage.hpp"
#include "device/device.hpp"
#include "device/staging.hpp"

namespace penstock {

class CudaDevice : public Device {
 public:
  /// CUDA devices that this process can use; 0 also without a driver.
  static int count() noexcept;
  static std::string unavailable_reason();

  /// @param ordinal  Below `count()`.
  explicit CudaDevice(int ordinal);

  DeviceInfo info() const override { return info_; }
  MemoryInfo memory_info() override;
  std::optional<ProcessMemory> process_memory() override;
  void synchronize() override;

  StreamHandle stream_create() override;
  void stream_destroy(StreamHandle stream) override;
  void stream_synchronize(StreamHandle stream) override;
  bool stream_capturing(StreamHandle stream) override;
  CaptureMode exchange_capture_mode(CaptureMode mode) override;
  EventHandle event_create(Timing timing) override;
  void event_destroy(EventHandle event) override;
  void event_record(EventHandle event, StreamHandle stream) override;
  void event_wait(StreamHandle stream, EventHandle event) override;
  void event_synchronize(EventHandle event) override;
  bool event_done(EventHandle event) override;
  double event_elapsed(EventHandle start, EventHandle end) override;

  void* managed_reserve(std::size_t nbytes, Access access) override;
  void managed_release(void* address, std::size_t nbytes) override;
  void managed_read(void* address, const File& file, std::uint64_t offset,
                    std::size_t nbytes) override;
  void managed_write(void* address, const void* source, std::size_t nbytes) override;
  void managed_seal(void* address, std::size_t nbytes) override;
  void managed_keep(void* address, std::size_t nbytes, StreamHandle stream) override;
  void managed_stay(void* address, std::size_t nbytes) override;
  void managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) override;
  void managed_evict(void* address, std::size_t nbytes, Access access,
                     StreamHandle stream) override;
  std::optional<std::size_t> managed_resident(const void* address, std::size_t nbytes) override;

  void* address_reserve(std::size_t nbytes) override;
  void address_release(void* address, std::size_t nbytes) override;
  FrameHandle frame_create(std::size_t nbytes) override;
  void frame_release(FrameHandle frame) override;
  void map(void* address, FrameHandle frame, std::size_t nbytes) override;
  void unmap(void* address, std::size_t nbytes) override;

  void* pinned_allocate(std::size_t nbytes) override;
  void pinned_free(void* address, std::size_t nbytes) override;
  void host_register(void* address, std::size_t nbytes, HostAccess access) override;
  void host_unregister(void* address) override;
  void fill(void* address, std::uint8_t value, std::size_t nbytes, StreamHandle stream) override;
  void copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) override;

 private:
  CudaUsage usage_;  // first: it looks before there is a context
  DeviceInfo info_;
  Staging staging_;
};

}  // namespace penstock
