#include "device/testing/faulty_device.hpp"

#include <thread>
#include <utility>

#include "error/error.hpp"

namespace penstock {

FaultyDevice::FaultyDevice(std::shared_ptr<Device> inner) : inner_(std::move(inner)) {}

void FaultyDevice::fail_nth_call(std::uint64_t nth) {
  fail_nth_call_of("", nth);
}

void FaultyDevice::fail_nth_call_of(const std::string& name, std::uint64_t nth) {
  const std::lock_guard lock(mutex_);
  failing_name_ = name;
  left_ = nth;
  fired_ = false;
}

void FaultyDevice::delay_calls_of(const std::string& name, std::chrono::microseconds delay) {
  const std::lock_guard lock(mutex_);
  delays_[name] = delay;
}

void FaultyDevice::set_outside(std::optional<std::size_t> nbytes, bool whole_device) {
  const std::lock_guard lock(mutex_);
  outside_.reset();
  if (nbytes) outside_ = ProcessMemory{*nbytes, whole_device};
}

void FaultyDevice::reset() {
  const std::lock_guard lock(mutex_);
  calls_.clear();
  delays_.clear();
  left_.reset();
  fired_ = false;
}

std::map<std::string, std::uint64_t> FaultyDevice::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

bool FaultyDevice::fired() const {
  const std::lock_guard lock(mutex_);
  return fired_;
}

void FaultyDevice::enter(const char* name) {
  std::chrono::microseconds delay{0};
  bool fails = false;
  {
    const std::lock_guard lock(mutex_);
    ++calls_[name];
    if (const auto found = delays_.find(name); found != delays_.end()) delay = found->second;
    if (left_ && (failing_name_.empty() || failing_name_ == name)) {
      fails = *left_ == 0;
      left_ = fails ? std::nullopt : std::optional(*left_ - 1);
      fired_ = fired_ || fails;
    }
  }
  if (delay.count() > 0) std::this_thread::sleep_for(delay);
  if (fails) throw DeviceError(name, -1, "injected fault");
}

MemoryInfo FaultyDevice::memory_info() {
  enter("memory_info");
  return inner_->memory_info();
}
std::optional<ProcessMemory> FaultyDevice::process_memory() {
  enter("process_memory");
  const std::lock_guard lock(mutex_);
  if (!outside_) return inner_->process_memory();
  ProcessMemory held = *outside_;
  for (const auto& [frame, nbytes] : frames_) held.bytes += nbytes;
  return held;
}
void FaultyDevice::synchronize() {
  enter("synchronize");
  inner_->synchronize();
}
StreamHandle FaultyDevice::stream_create() {
  enter("stream_create");
  return inner_->stream_create();
}
void FaultyDevice::stream_destroy(StreamHandle stream) {
  inner_->stream_destroy(stream);
  enter("stream_destroy");
}
void FaultyDevice::stream_synchronize(StreamHandle stream) {
  enter("stream_synchronize");
  inner_->stream_synchronize(stream);
}
bool FaultyDevice::stream_capturing(StreamHandle stream) {
  enter("stream_capturing");
  return inner_->stream_capturing(stream);
}
CaptureMode FaultyDevice::exchange_capture_mode(CaptureMode mode) {
  return inner_->exchange_capture_mode(mode);  // cannot fail, and is not counted
}
EventHandle FaultyDevice::event_create(Timing timing) {
  enter("event_create");
  return inner_->event_create(timing);
}
void FaultyDevice::event_destroy(EventHandle event) {
  inner_->event_destroy(event);
  enter("event_destroy");
}
void FaultyDevice::event_record(EventHandle event, StreamHandle stream) {
  enter("event_record");
  inner_->event_record(event, stream);
}
void FaultyDevice::event_wait(StreamHandle stream, EventHandle event) {
  enter("event_wait");
  inner_->event_wait(stream, event);
}
void FaultyDevice::event_synchronize(EventHandle event) {
  enter("event_synchronize");
  inner_->event_synchronize(event);
}
bool FaultyDevice::event_done(EventHandle event) {
  enter("event_done");
  return inner_->event_done(event);
}
double FaultyDevice::event_elapsed(EventHandle start, EventHandle end) {
  enter("event_elapsed");
  return inner_->event_elapsed(start, end);
}
void* FaultyDevice::managed_reserve(std::size_t nbytes, Access access) {
  enter("managed_reserve");
  return inner_->managed_reserve(nbytes, access);
}
void FaultyDevice::managed_release(void* address, std::size_t nbytes) {
  inner_->managed_release(address, nbytes);
  enter("managed_release");
}
void FaultyDevice::managed_read(void* address, const File& file, std::uint64_t offset,
                                std::size_t nbytes) {
  enter("managed_read");
  inner_->managed_read(address, file, offset, nbytes);
}
void FaultyDevice::managed_write(void* address, const void* source, std::size_t nbytes) {
  enter("managed_write");
  inner_->managed_write(address, source, nbytes);
}
void FaultyDevice::managed_seal(void* address, std::size_t nbytes) {
  enter("managed_seal");
  inner_->managed_seal(address, nbytes);
}
void FaultyDevice::managed_keep(void* address, std::size_t nbytes, StreamHandle stream) {
  enter("managed_keep");
  inner_->managed_keep(address, nbytes, stream);
}
void FaultyDevice::managed_stay(void* address, std::size_t nbytes) {
  enter("managed_stay");
  inner_->managed_stay(address, nbytes);
}
void FaultyDevice::managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) {
  enter("managed_prefetch");
  inner_->managed_prefetch(address, nbytes, stream);
}
void FaultyDevice::managed_evict(void* address, std::size_t nbytes, Access access,
                                 StreamHandle stream) {
  enter("managed_evict");
  inner_->managed_evict(address, nbytes, access, stream);
}
std::optional<std::size_t> FaultyDevice::managed_resident(const void* address, std::size_t nbytes) {
  enter("managed_resident");
  return inner_->managed_resident(address, nbytes);
}
void* FaultyDevice::address_reserve(std::size_t nbytes) {
  enter("address_reserve");
  return inner_->address_reserve(nbytes);
}
void FaultyDevice::address_release(void* address, std::size_t nbytes) {
  inner_->address_release(address, nbytes);
  enter("address_release");
}
FrameHandle FaultyDevice::frame_create(std::size_t nbytes) {
  enter("frame_create");
  const FrameHandle frame = inner_->frame_create(nbytes);
  const std::lock_guard lock(mutex_);
  frames_[frame.value] = nbytes;
  return frame;
}
void FaultyDevice::frame_release(FrameHandle frame) {
  inner_->frame_release(frame);
  {
    const std::lock_guard lock(mutex_);
    frames_.erase(frame.value);
  }
  enter("frame_release");
}
void FaultyDevice::map(void* address, FrameHandle frame, std::size_t nbytes) {
  enter("map");
  inner_->map(address, frame, nbytes);
}
void FaultyDevice::unmap(void* address, std::size_t nbytes) {
  enter("unmap");
  inner_->unmap(address, nbytes);
}
void* FaultyDevice::pinned_allocate(std::size_t nbytes) {
  enter("pinned_allocate");
  return inner_->pinned_allocate(nbytes);
}
void FaultyDevice::pinned_free(void* address, std::size_t nbytes) {
  inner_->pinned_free(address, nbytes);
  enter("pinned_free");
}
void FaultyDevice::host_register(void* address, std::size_t nbytes, HostAccess access) {
  enter("host_register");
  inner_->host_register(address, nbytes, access);
}
void FaultyDevice::host_unregister(void* address) {
  inner_->host_unregister(address);
  enter("host_unregister");
}
void FaultyDevice::fill(void* address, std::uint8_t value, std::size_t nbytes,
                        StreamHandle stream) {
  enter("fill");
  inner_->fill(address, value, nbytes, stream);
}
void FaultyDevice::copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) {
  enter("copy");
  inner_->copy(target, source, nbytes, stream);
}
void FaultyDevice::copy_mapped(void* target, const void* source, const File& file,
                               std::uint64_t offset, std::size_t nbytes, StreamHandle stream) {
  enter("copy");
  inner_->copy_mapped(target, source, file, offset, nbytes, stream);
}

}  // namespace penstock
