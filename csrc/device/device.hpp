// The device is everything that Penstock asks of the hardware: streams and events, managed memory,
// frames and the addresses they are mapped under, copies. It is the only room with CUDA calls;
// above it nothing knows whether it runs on a GPU (CudaDevice), on the operating system's memory
// (HostDevice), or under a test that makes a call fail (FaultyDevice, around either).
//
// Both ways of putting memory under a region are here. Managed: one range whose pages the device
// brings in and drops (managed_*). Frames: reserved addresses, physical frames, and mappings
// between them, several addresses on one frame if wanted (address_*, frame_*, map, unmap).
//
// Ownership: the functions hand out raw handles; handles.hpp has their owners. Threads: all
// functions are thread-safe; the work of one stream runs in order. Errors: every failure throws
// DeviceError; nothing is half done but where a function says so. A null stream is the caller's own
// order of work: the legacy default stream on CUDA, the calling thread on the host.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

namespace penstock {

class File;

/// A stream of the device: a cudaStream_t on CUDA. Null is the default stream.
struct StreamHandle {
  void* value = nullptr;
};

/// A point in a stream's work that others can wait for.
struct EventHandle {
  void* value = nullptr;
};

/// A piece of physical memory that can be mapped under addresses.
struct FrameHandle {
  std::uint64_t value = 0;
};

/// How managed memory is used, which decides what evicting it costs.
enum class Access : std::uint8_t {
  kReadMostly,  ///< Filled once, then read: evicting drops the device's copy and moves nothing.
  kReadWrite,   ///< Written at any time: evicting keeps what was written.
};

/// Whether an event notes the time at which it is reached. Waiting for one that does not is
/// cheaper.
enum class Timing : bool { kOff, kOn };

/// What the device may do with host memory that is registered.
enum class HostAccess : bool { kReadWrite, kReadOnly };

/// While a stream captures, calls that could disturb it are refused, in each thread or in the one
/// that captures only; kRelaxed lets the thread's own calls through.
enum class CaptureMode : std::uint8_t { kGlobal, kThreadLocal, kRelaxed };

enum class DeviceKind : std::uint8_t { kHost, kCuda };

/// What a device is. Sizes in bytes.
struct DeviceInfo {
  DeviceKind kind = DeviceKind::kHost;
  int ordinal = 0;
  std::string name;
  std::size_t total_bytes = 0;
  std::size_t frame_granularity = 0;  ///< Frames and mappings are multiples of this.
  std::string no_managed_reason;      ///< Why managed memory cannot be used; empty if it can.
  int driver_version = 0;             ///< As CUDA counts it, 13000 for 13.0; 0 on the host.
  int runtime_version = 0;
};

/// Physical memory as the driver (or the operating system) reports it, in bytes.
struct MemoryInfo {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
};

/// What a process holds on a device, in bytes: its context, loaded kernels, what libraries take.
struct ProcessMemory {
  std::size_t bytes = 0;
  bool whole_device = false;  ///< It could not be singled out: what others take counts as ours.
};

class Device {
 public:
  /// Bytes of managed memory that a device moves as a whole, if only a part of them is touched.
  static constexpr std::size_t kManagedBlock = std::size_t{2} << 20;

  virtual ~Device() = default;
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  virtual DeviceInfo info() const = 0;
  virtual MemoryInfo memory_info() = 0;
  /// What this process holds on the device, whoever asked for it; none where nobody can tell.
  virtual std::optional<ProcessMemory> process_memory() = 0;

  /// Blocks the caller until all work given to the device so far is over, also of streams that are
  /// not known any more. Not for while a stream captures. @throws what work threw, where that is
  /// seen.
  virtual void synchronize() = 0;

  // Streams and events.
  virtual StreamHandle stream_create() = 0;
  virtual void stream_destroy(StreamHandle stream) = 0;
  virtual void stream_synchronize(StreamHandle stream) = 0;
  /// Whether work given to the stream is written down for a graph and not run. Events must not be
  /// recorded on it then for anything outside of the graph.
  virtual bool stream_capturing(StreamHandle stream) = 0;
  /// Which calls of this thread are refused while a stream captures. @return what held before.
  virtual CaptureMode exchange_capture_mode(CaptureMode mode) = 0;
  virtual EventHandle event_create(Timing timing) = 0;
  virtual void event_destroy(EventHandle event) = 0;
  /// The event now stands for all work given to `stream` so far.
  virtual void event_record(EventHandle event, StreamHandle stream) = 0;
  /// Later work of `stream` runs after the event. Blocks the caller only where the stream is the
  /// calling thread itself (the host's null stream). @throws what the awaited work threw.
  virtual void event_wait(StreamHandle stream, EventHandle event) = 0;
  /// Blocks the caller until the event. @throws what the awaited work threw.
  virtual void event_synchronize(EventHandle event) = 0;
  virtual bool event_done(EventHandle event) = 0;
  /// Seconds from one event to another; both are timed, were recorded, and are done.
  virtual double event_elapsed(EventHandle start, EventHandle end) = 0;

  // Managed memory: readable at any time; being resident only decides how fast.
  /// Reserves `nbytes` of managed addresses, none of them resident, aligned to kManagedBlock.
  virtual void* managed_reserve(std::size_t nbytes, Access access) = 0;
  virtual void managed_release(void* address, std::size_t nbytes) = 0;
  /// Puts `nbytes` of a file at `address` without making the range resident. For filling a range,
  /// before it is sealed.
  /// @throws CheckpointError where the file ends early or cannot be read.
  virtual void managed_read(void* address, const File& file, std::uint64_t offset,
                            std::size_t nbytes) = 0;
  /// The same with `nbytes` of host memory.
  virtual void managed_write(void* address, const void* source, std::size_t nbytes) = 0;
  /// Declares that the range holds its bytes and will mostly be read; needed once, before the first
  /// prefetch of a kReadMostly range. Filling is many times faster before than after it.
  virtual void managed_seal(void* address, std::size_t nbytes) = 0;
  /// Keeps what the work of `stream` has written to a resident part of a kReadMostly range, which
  /// evicting would lose: in whole kManagedBlock from the range's start. Blocks the caller.
  virtual void managed_keep(void* address, std::size_t nbytes, StreamHandle stream) = 0;
  /// Has the device reach the range where it is, on the host, instead of moving pages to where they
  /// are used: what is written stays there, and none of it is ever resident.
  virtual void managed_stay(void* address, std::size_t nbytes) = 0;
  /// Makes the range resident, as work of `stream`.
  virtual void managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) = 0;
  /// Takes the range off the device, keeping its bytes; complete when `stream` is. The caller sees
  /// to it that nothing on the device reads or prefetches the range any more.
  virtual void managed_evict(void* address, std::size_t nbytes, Access access,
                             StreamHandle stream) = 0;
  /// Bytes of the range that are resident, where the system can tell (CUDA cannot).
  virtual std::optional<std::size_t> managed_resident(const void* address, std::size_t nbytes) = 0;

  // Frames. All sizes and addresses are multiples of the frame granularity.
  virtual void* address_reserve(std::size_t nbytes) = 0;
  virtual void address_release(void* address, std::size_t nbytes) = 0;
  virtual FrameHandle frame_create(std::size_t nbytes) = 0;
  virtual void frame_release(FrameHandle frame) = 0;
  /// Maps a whole frame of `nbytes` at `address`, readable and writable. A frame may be mapped at
  /// several addresses at once.
  virtual void map(void* address, FrameHandle frame, std::size_t nbytes) = 0;
  virtual void unmap(void* address, std::size_t nbytes) = 0;

  // Host memory that the device copies at full rate.
  virtual void* pinned_allocate(std::size_t nbytes) = 0;
  virtual void pinned_free(void* address, std::size_t nbytes) = 0;
  /// Lets the device copy at full rate from host memory that is there already (a mapping of a file
  /// is read-only and shared). Blocks while the system fixes the memory in place.
  virtual void host_register(void* address, std::size_t nbytes, HostAccess access) = 0;
  virtual void host_unregister(void* address) = 0;
  /// Sets bytes of a frame, as work of `stream`.
  virtual void fill(void* address, std::uint8_t value, std::size_t nbytes, StreamHandle stream) = 0;
  /// Copies between any two of pinned, frame and managed memory, as work of `stream`.
  virtual void copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) = 0;
  /// Copies from a mapping of a file that is registered. The host reads the file instead, at
  /// `offset`: touching what the file has no more would end the process. There the stream's error
  /// is a CheckpointError where the file ends early or was changed. The file outlives the copy.
  virtual void copy_mapped(void* target, const void* source, const File& /*file*/,
                           std::uint64_t /*offset*/, std::size_t nbytes, StreamHandle stream) {
    copy(target, source, nbytes, stream);
  }

  /// Records a failure where no error can be thrown: the destructor of a handle's owner.
  void suppress(const std::string& what) noexcept;
  std::uint64_t suppressed_count() const noexcept { return suppressed_count_.load(); }
  std::string last_suppressed() const;

 private:
  std::atomic<std::uint64_t> suppressed_count_{0};
  mutable std::mutex suppressed_mutex_;
  std::string last_suppressed_;
};

}  // namespace penstock
