// The device of machines without a GPU, and the one that tests run on: the operating system's
// memory under the same rules. Streams are worker threads (HostStream), managed memory is the
// system's own demand paging (HostMemory), and frames are pieces of one memfd that are mapped,
// shared, wherever they are wanted, so that two addresses on one frame really see the same bytes.
// Unmapped addresses cannot be read. Thread-safe.
#pragma once

#include <map>
#include <set>

#include "device/device.hpp"
#include "device/host/host_memory.hpp"

namespace penstock {

class HostStream;

class HostDevice : public Device {
 public:
  HostDevice() = default;
  ~HostDevice() override;

  DeviceInfo info() const override;
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
  void copy_mapped(void* target, const void* source, const File& file, std::uint64_t offset,
                   std::size_t nbytes, StreamHandle stream) override;

 private:
  struct FramePlace {
    std::uint64_t offset;
    std::size_t nbytes;
  };
  FramePlace frame_place(FrameHandle frame);

  HostMemory managed_;
  std::mutex streams_mutex_;
  std::set<HostStream*> streams_;
  std::mutex frames_mutex_;
  int frames_descriptor_ = -1;
  std::uint64_t frames_end_ = 0;
  std::uint64_t next_frame_ = 1;
  std::map<std::uint64_t, FramePlace> frames_;
  std::multimap<std::size_t, std::uint64_t> free_offsets_;  // by size
};

}  // namespace penstock
