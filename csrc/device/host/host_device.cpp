#include "device/host/host_device.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "device/host/host_stream.hpp"
#include "io/file.hpp"
#include "io/mapping.hpp"

namespace penstock {

namespace {

constexpr std::size_t kFrameGranularity = std::size_t{64} << 10;

HostEvent& event_of(EventHandle event) {
  return *static_cast<HostEvent*>(event.value);
}

HostStream* stream_of(StreamHandle stream) {
  return static_cast<HostStream*>(stream.value);
}

void submit(StreamHandle stream, std::function<void()> task) {
  if (HostStream* worker = stream_of(stream)) {
    worker->submit(std::move(task));
  } else {
    task();
  }
}

void require_granular(const char* what, std::size_t nbytes) {
  if (nbytes == 0 || nbytes % kFrameGranularity != 0) {
    throw std::invalid_argument(std::string(what) + ": " + std::to_string(nbytes) +
                                " bytes is not a multiple of " + std::to_string(kFrameGranularity));
  }
}

}  // namespace

HostDevice::~HostDevice() {
  if (frames_descriptor_ >= 0) ::close(frames_descriptor_);
}

DeviceInfo HostDevice::info() const {
  DeviceInfo info;
  info.kind = DeviceKind::kHost;
  info.name = "host memory";
  info.total_bytes = static_cast<std::size_t>(::sysconf(_SC_PHYS_PAGES)) * system_page();
  info.frame_granularity = kFrameGranularity;
  return info;
}

MemoryInfo HostDevice::memory_info() {
  std::ifstream table("/proc/meminfo");
  MemoryInfo info;
  std::string key;
  std::string rest;
  for (std::size_t kib = 0; table >> key >> kib && std::getline(table, rest);) {
    if (key == "MemTotal:") info.total_bytes = kib << 10;
    if (key == "MemAvailable:") info.free_bytes = kib << 10;
  }
  return info;
}

std::optional<ProcessMemory> HostDevice::process_memory() {
  return std::nullopt;  // the process lives in the same memory
}

void HostDevice::synchronize() {
  std::vector<std::shared_ptr<Completion>> ends;
  {
    const std::lock_guard lock(streams_mutex_);
    for (HostStream* stream : streams_) {
      HostEvent event;
      stream->record(event);
      ends.push_back(event.latest());
    }
  }
  std::exception_ptr error;
  for (const auto& end : ends) {
    try {
      end->wait();
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

StreamHandle HostDevice::stream_create() {
  auto stream = std::make_unique<HostStream>();
  const std::lock_guard lock(streams_mutex_);
  streams_.insert(stream.get());
  return {stream.release()};
}

void HostDevice::stream_destroy(StreamHandle stream) {
  const std::unique_ptr<HostStream> owned(stream_of(stream));
  const std::lock_guard lock(streams_mutex_);
  streams_.erase(owned.get());
}

void HostDevice::stream_synchronize(StreamHandle stream) {
  if (HostStream* worker = stream_of(stream)) worker->synchronize();
}

bool HostDevice::stream_capturing(StreamHandle /*stream*/) {
  return false;
}

CaptureMode HostDevice::exchange_capture_mode(CaptureMode /*mode*/) {
  return CaptureMode::kGlobal;
}

EventHandle HostDevice::event_create(Timing /*timing*/) {
  return {std::make_unique<HostEvent>().release()};
}

void HostDevice::event_destroy(EventHandle event) {
  const std::unique_ptr<HostEvent> owned(&event_of(event));
}

void HostDevice::event_record(EventHandle event, StreamHandle stream) {
  if (HostStream* worker = stream_of(stream)) {
    worker->record(event_of(event));
  } else {
    event_of(event).record()->complete(nullptr);
  }
}

void HostDevice::event_wait(StreamHandle stream, EventHandle event) {
  if (HostStream* worker = stream_of(stream)) {
    worker->wait(event_of(event));
  } else {
    event_synchronize(event);
  }
}

void HostDevice::event_synchronize(EventHandle event) {
  if (const auto completion = event_of(event).latest()) completion->wait();
}

bool HostDevice::event_done(EventHandle event) {
  const auto completion = event_of(event).latest();
  return completion == nullptr || completion->done();
}

double HostDevice::event_elapsed(EventHandle start, EventHandle end) {
  const auto first = event_of(start).latest();
  const auto last = event_of(end).latest();
  if (!first || !last || !first->done() || !last->done()) {
    throw std::invalid_argument("event_elapsed: an event was not reached yet");
  }
  return std::chrono::duration<double>(last->time() - first->time()).count();
}

void* HostDevice::managed_reserve(std::size_t nbytes, Access /*access*/) {
  return managed_.reserve(nbytes);
}

void HostDevice::managed_release(void* address, std::size_t /*nbytes*/) {
  managed_.release(address);
}

void HostDevice::managed_read(void* address, const File& file, std::uint64_t offset,
                              std::size_t nbytes) {
  managed_.read(address, file, offset, nbytes);
}

void HostDevice::managed_write(void* address, const void* source, std::size_t nbytes) {
  managed_.write(address, source, nbytes);
}

void HostDevice::managed_seal(void* /*address*/, std::size_t /*nbytes*/) {}

void HostDevice::managed_keep(void* /*address*/, std::size_t /*nbytes*/, StreamHandle stream) {
  stream_synchronize(stream);  // what is written to the mapping is in the spill file
}

void HostDevice::managed_stay(void* /*address*/, std::size_t /*nbytes*/) {}

void HostDevice::managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) {
  submit(stream, [this, address, nbytes] { managed_.populate(address, nbytes); });
}

void HostDevice::managed_evict(void* address, std::size_t nbytes, Access /*access*/,
                               StreamHandle stream) {
  submit(stream, [this, address, nbytes] { managed_.drop(address, nbytes); });
}

std::optional<std::size_t> HostDevice::managed_resident(const void* address, std::size_t nbytes) {
  return managed_.resident(address, nbytes);
}

void* HostDevice::address_reserve(std::size_t nbytes) {
  require_granular("address_reserve", nbytes);
  return reserve_addresses(nbytes, kFrameGranularity);
}

void HostDevice::address_release(void* address, std::size_t nbytes) {
  if (::munmap(address, nbytes) != 0) throw system_error("munmap", errno);
}

FrameHandle HostDevice::frame_create(std::size_t nbytes) {
  require_granular("frame_create", nbytes);
  const std::lock_guard lock(frames_mutex_);
  if (frames_descriptor_ < 0) {
    frames_descriptor_ = ::memfd_create("penstock-frames", MFD_CLOEXEC);
    if (frames_descriptor_ < 0) throw system_error("memfd_create", errno);
  }
  std::uint64_t offset = frames_end_;
  if (const auto reused = free_offsets_.find(nbytes); reused != free_offsets_.end()) {
    offset = reused->second;
    free_offsets_.erase(reused);
  } else {
    const std::uint64_t end = frames_end_ + nbytes;
    if (::ftruncate(frames_descriptor_, static_cast<off_t>(end)) != 0) {
      throw system_error("ftruncate", errno);
    }
    frames_end_ = end;
  }
  frames_.emplace(next_frame_, FramePlace{offset, nbytes});
  return {next_frame_++};
}

void HostDevice::frame_release(FrameHandle frame) {
  const FramePlace place = frame_place(frame);
  const std::lock_guard lock(frames_mutex_);
  frames_.erase(frame.value);
  free_offsets_.emplace(place.nbytes, place.offset);
  if (::fallocate(frames_descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(place.offset), static_cast<off_t>(place.nbytes)) != 0) {
    throw system_error("fallocate(FALLOC_FL_PUNCH_HOLE)", errno);
  }
}

HostDevice::FramePlace HostDevice::frame_place(FrameHandle frame) {
  const std::lock_guard lock(frames_mutex_);
  const auto found = frames_.find(frame.value);
  if (found == frames_.end()) throw std::invalid_argument("unknown frame");
  return found->second;
}

void HostDevice::map(void* address, FrameHandle frame, std::size_t nbytes) {
  const FramePlace place = frame_place(frame);
  if (nbytes != place.nbytes) throw std::invalid_argument("map: a frame is mapped whole");
  map_fixed(address, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, frames_descriptor_, place.offset);
}

void HostDevice::unmap(void* address, std::size_t nbytes) {
  map_fixed(address, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void* HostDevice::pinned_allocate(std::size_t nbytes) {
  void* address =
      ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) throw system_error("mmap", errno);
  return address;
}

void HostDevice::pinned_free(void* address, std::size_t nbytes) {
  if (::munmap(address, nbytes) != 0) throw system_error("munmap", errno);
}

void HostDevice::host_register(void* /*address*/, std::size_t /*nbytes*/, HostAccess /*access*/) {}

void HostDevice::host_unregister(void* /*address*/) {}

void HostDevice::fill(void* address, std::uint8_t value, std::size_t nbytes, StreamHandle stream) {
  submit(stream, [address, value, nbytes] { std::memset(address, value, nbytes); });
}

void HostDevice::copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) {
  submit(stream, [target, source, nbytes] { std::memcpy(target, source, nbytes); });
}

void HostDevice::copy_mapped(void* target, const void* /*source*/, const File& file,
                             std::uint64_t offset, std::size_t nbytes, StreamHandle stream) {
  submit(stream, [target, &file, offset, nbytes] { file.read(target, offset, nbytes); });
}

}  // namespace penstock
