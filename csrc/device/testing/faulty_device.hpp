// A device around another one that fails or delays calls on demand: how tests show that every error
// path leaves the ledger balanced and the manager usable, and how races are provoked. Calls are
// named as in Device ("managed_prefetch") and counted. A failing call is not passed on, but for
// those that give a handle back: these pass it on first, so that a test leaks nothing. On request
// it tells of memory that the process holds beside its frames, which the host device knows nothing
// of. Thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "device/device.hpp"

namespace penstock {

class FaultyDevice : public Device {
 public:
  explicit FaultyDevice(std::shared_ptr<Device> inner);

  /// Makes the `nth` call from now fail (0 is the next one), of any function, once.
  void fail_nth_call(std::uint64_t nth);
  /// Makes the `nth` call of function `name` from now fail, once.
  void fail_nth_call_of(const std::string& name, std::uint64_t nth);
  /// Makes every call of function `name` last `delay` longer.
  void delay_calls_of(const std::string& name, std::chrono::microseconds delay);
  /// Has process_memory tell `nbytes` more than the frames that were made through this device hold;
  /// none: what the device inside says.
  void set_outside(std::optional<std::size_t> nbytes, bool whole_device = false);
  /// Forgets all faults and delays, and counts from zero.
  void reset();
  std::map<std::string, std::uint64_t> calls() const;
  /// Whether the fault that was asked for has happened.
  bool fired() const;

  DeviceInfo info() const override { return inner_->info(); }
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
  void enter(const char* name);

  std::shared_ptr<Device> inner_;
  mutable std::mutex mutex_;
  std::map<std::string, std::uint64_t> calls_;
  std::map<std::string, std::chrono::microseconds> delays_;
  std::string failing_name_;           // empty: any function
  std::optional<std::uint64_t> left_;  // calls before the one that fails
  bool fired_ = false;
  std::map<std::uint64_t, std::size_t> frames_;  // bytes of each
  std::optional<ProcessMemory> outside_;
};

}  // namespace penstock
