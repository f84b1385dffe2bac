#include "device/cuda/cuda_device.hpp"

#include <cstring>

#include "device/cuda/cuda_api.hpp"
#include "device/handles.hpp"
#include "error/error.hpp"
#include "io/file.hpp"

namespace penstock {

using cuda_api::check;
using cuda_api::driver;

namespace {

// Selects a GPU for the calling thread and puts the thread's own choice back. Sets it once in each
// thread even where it is the thread's choice: that is what makes the GPU's primary context
// current, which driver calls need.
class SelectDevice {
 public:
  explicit SelectDevice(int ordinal) : ordinal_(ordinal) {
    thread_local int current = -1;  // the last that was set here
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == ordinal && current == ordinal) return;
    check(cudaSetDevice(ordinal), "cudaSetDevice");
    current = ordinal;
  }
  ~SelectDevice() {
    if (previous_ != ordinal_) static_cast<void>(cudaSetDevice(previous_));  // it was valid
  }
  SelectDevice(const SelectDevice&) = delete;
  SelectDevice& operator=(const SelectDevice&) = delete;

 private:
  int ordinal_;
  int previous_ = 0;
};

cudaStream_t native(StreamHandle stream) {
  return static_cast<cudaStream_t>(stream.value);
}
cudaEvent_t native(EventHandle event) {
  return static_cast<cudaEvent_t>(event.value);
}
CUdeviceptr native(const void* address) {
  return reinterpret_cast<CUdeviceptr>(address);
}

CUmemAllocationProp frame_properties(int ordinal) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = ordinal;
  return properties;
}

int attribute(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, ordinal), "cudaDeviceGetAttribute");
  return value;
}

// With the direction said, the GPU copies; else the process may do it where managed memory is on
// the host.
Staging::Copy copying(cudaMemcpyKind kind) {
  return [kind](void* target, const void* source, std::size_t nbytes, StreamHandle stream) {
    check(cudaMemcpyAsync(target, source, nbytes, kind, native(stream)), "cudaMemcpyAsync");
  };
}

}  // namespace

int CudaDevice::count() noexcept {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess) return devices;
  static_cast<void>(cudaGetLastError());
  return 0;
}

std::string CudaDevice::unavailable_reason() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  static_cast<void>(cudaGetLastError());
  int driver_version = 0;
  const bool asked = cudaDriverGetVersion(&driver_version) == cudaSuccess;
  static_cast<void>(cudaGetLastError());
  if (status == cudaErrorInsufficientDriver && asked && driver_version == 0) {
    return "this system has no NVIDIA GPU, or does not show it to this process";
  }
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return devices > 0 ? "" : "no CUDA device is visible to this process";
}

CudaDevice::CudaDevice(int ordinal)
    : usage_(ordinal),
      staging_(*this, copying(cudaMemcpyHostToDevice), copying(cudaMemcpyDeviceToHost)) {
  const SelectDevice selected(ordinal);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  info_.kind = DeviceKind::kCuda;
  info_.ordinal = ordinal;
  info_.name = properties.name;
  info_.total_bytes = properties.totalGlobalMem;
  check(cudaDriverGetVersion(&info_.driver_version), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&info_.runtime_version), "cudaRuntimeGetVersion");
  if (attribute(cudaDevAttrConcurrentManagedAccess, ordinal) == 0) {
    info_.no_managed_reason =
        "this GPU and system cannot share managed memory between host and device at the same time";
  }
  const CUmemAllocationProp frame = frame_properties(ordinal);
  check(driver().granularity(&info_.frame_granularity, &frame, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        "cuMemGetAllocationGranularity");
}

MemoryInfo CudaDevice::memory_info() {
  const SelectDevice selected(info_.ordinal);
  MemoryInfo info;
  check(cudaMemGetInfo(&info.free_bytes, &info.total_bytes), "cudaMemGetInfo");
  return info;
}

std::optional<ProcessMemory> CudaDevice::process_memory() {
  if (const auto held = usage_.read()) return held;
  // Nothing is known of the time before the context, so all that is taken counts as ours.
  const RelaxedCapture relaxed(*this);
  const MemoryInfo info = memory_info();
  return ProcessMemory{info.total_bytes - info.free_bytes, true};
}

void CudaDevice::synchronize() {
  const SelectDevice selected(info_.ordinal);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

StreamHandle CudaDevice::stream_create() {
  const SelectDevice selected(info_.ordinal);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return {stream};
}

void CudaDevice::stream_destroy(StreamHandle stream) {
  check(cudaStreamDestroy(native(stream)), "cudaStreamDestroy");
}

void CudaDevice::stream_synchronize(StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
}

bool CudaDevice::stream_capturing(StreamHandle stream) {
  // A stream knows its GPU; the default one of another GPU answers the same: whether any captures.
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t result = cudaStreamIsCapturing(native(stream), &status);
  if (result == cudaErrorStreamCaptureImplicit) {  // the default stream, beside one that captures
    static_cast<void>(cudaGetLastError());
    return true;
  }
  check(result, "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

CaptureMode CudaDevice::exchange_capture_mode(CaptureMode mode) {
  cudaStreamCaptureMode native_mode = cudaStreamCaptureModeGlobal;
  if (mode == CaptureMode::kThreadLocal) native_mode = cudaStreamCaptureModeThreadLocal;
  if (mode == CaptureMode::kRelaxed) native_mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&native_mode), "cudaThreadExchangeStreamCaptureMode");
  if (native_mode == cudaStreamCaptureModeThreadLocal) return CaptureMode::kThreadLocal;
  return native_mode == cudaStreamCaptureModeRelaxed ? CaptureMode::kRelaxed : CaptureMode::kGlobal;
}

EventHandle CudaDevice::event_create(Timing timing) {
  const SelectDevice selected(info_.ordinal);
  cudaEvent_t event = nullptr;
  const unsigned untimed = timing == Timing::kOff ? cudaEventDisableTiming : 0U;
  check(cudaEventCreateWithFlags(&event, untimed | cudaEventBlockingSync),
        "cudaEventCreateWithFlags");
  return {event};
}

void CudaDevice::event_destroy(EventHandle event) {
  check(cudaEventDestroy(native(event)), "cudaEventDestroy");
}

void CudaDevice::event_record(EventHandle event, StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  check(cudaEventRecord(native(event), native(stream)), "cudaEventRecord");
}

void CudaDevice::event_wait(StreamHandle stream, EventHandle event) {
  const SelectDevice selected(info_.ordinal);
  check(cudaStreamWaitEvent(native(stream), native(event), 0), "cudaStreamWaitEvent");
}

void CudaDevice::event_synchronize(EventHandle event) {
  check(cudaEventSynchronize(native(event)), "cudaEventSynchronize");
}

bool CudaDevice::event_done(EventHandle event) {
  const cudaError_t status = cudaEventQuery(native(event));
  if (status == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  check(status, "cudaEventQuery");
  return true;
}

double CudaDevice::event_elapsed(EventHandle start, EventHandle end) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, native(start), native(end)), "cudaEventElapsedTime");
  return static_cast<double>(milliseconds) * 1e-3;
}

void* CudaDevice::managed_reserve(std::size_t nbytes, Access /*access*/) {
  if (!info_.no_managed_reason.empty()) {
    throw DeviceError("managed_reserve", 0, info_.no_managed_reason);
  }
  const SelectDevice selected(info_.ordinal);
  void* address = nullptr;
  check(cudaMallocManaged(&address, nbytes, cudaMemAttachGlobal), "cudaMallocManaged");
  try {
    cuda_api::mem_advise(address, nbytes, cudaMemAdviseSetPreferredLocation,
                         cuda_api::kHostLocation);
  } catch (...) {
    static_cast<void>(cudaFree(address));  // the error under way says more
    throw;
  }
  return address;
}

void CudaDevice::managed_release(void* address, std::size_t /*nbytes*/) {
  const SelectDevice selected(info_.ordinal);
  check(cudaFree(address), "cudaFree");
}

void CudaDevice::managed_read(void* address, const File& file, std::uint64_t offset,
                              std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  staging_.write(address, nbytes, [&](void* buffer, std::size_t done, std::size_t part) {
    file.read(buffer, offset + done, part);
  });
}

void CudaDevice::managed_write(void* address, const void* source, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  staging_.write(address, nbytes, [&](void* buffer, std::size_t done, std::size_t part) {
    std::memcpy(buffer, static_cast<const std::byte*>(source) + done, part);
  });
}

void CudaDevice::managed_seal(void* address, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  cuda_api::mem_advise(address, nbytes, cudaMemAdviseSetReadMostly, info_.ordinal);
  staging_.release();
}

void CudaDevice::managed_keep(void* address, std::size_t nbytes, StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  // Written by the process, the bytes are the only ones, and no duplicate is on the device.
  stream_synchronize(stream);
  staging_.read(address, nbytes, [&](const void* buffer, std::size_t offset, std::size_t part) {
    std::memcpy(static_cast<std::byte*>(address) + offset, buffer, part);
  });
  cuda_api::mem_prefetch(address, nbytes, info_.ordinal, native(stream));
}

void CudaDevice::managed_stay(void* address, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  // Beside the preferred location, which is the host: the device maps the pages there.
  cuda_api::mem_advise(address, nbytes, cudaMemAdviseSetAccessedBy, info_.ordinal);
}

void CudaDevice::managed_prefetch(void* address, std::size_t nbytes, StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  cuda_api::mem_prefetch(address, nbytes, info_.ordinal, native(stream));
}

void CudaDevice::managed_evict(void* address, std::size_t nbytes, Access access,
                               StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  if (access == Access::kReadWrite) {
    cuda_api::mem_prefetch(address, nbytes, cuda_api::kHostLocation, native(stream));
    return;
  }
  cuda_api::mem_advise(address, nbytes, cudaMemAdviseUnsetReadMostly, info_.ordinal);
  cuda_api::mem_advise(address, nbytes, cudaMemAdviseSetReadMostly, info_.ordinal);
}

std::optional<std::size_t> CudaDevice::managed_resident(const void* /*address*/,
                                                        std::size_t /*nbytes*/) {
  return std::nullopt;  // CUDA has no such query
}

void* CudaDevice::address_reserve(std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  CUdeviceptr address = 0;
  check(driver().address_reserve(&address, nbytes, 0, 0, 0), "cuMemAddressReserve");
  return reinterpret_cast<void*>(address);
}

void CudaDevice::address_release(void* address, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  check(driver().address_free(native(address), nbytes), "cuMemAddressFree");
}

FrameHandle CudaDevice::frame_create(std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  const CUmemAllocationProp properties = frame_properties(info_.ordinal);
  CUmemGenericAllocationHandle handle = 0;
  check(driver().create(&handle, nbytes, &properties, 0), "cuMemCreate");
  return {handle};
}

void CudaDevice::frame_release(FrameHandle frame) {
  const SelectDevice selected(info_.ordinal);
  check(driver().release(frame.value), "cuMemRelease");
}

void CudaDevice::map(void* address, FrameHandle frame, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  check(driver().map(native(address), nbytes, 0, frame.value, 0), "cuMemMap");
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = info_.ordinal;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult granted = driver().set_access(native(address), nbytes, &access, 1);
  if (granted != CUDA_SUCCESS) static_cast<void>(driver().unmap(native(address), nbytes));
  check(granted, "cuMemSetAccess");
}

void CudaDevice::unmap(void* address, std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  check(driver().unmap(native(address), nbytes), "cuMemUnmap");
}

void* CudaDevice::pinned_allocate(std::size_t nbytes) {
  const SelectDevice selected(info_.ordinal);
  void* address = nullptr;
  check(cudaHostAlloc(&address, nbytes, cudaHostAllocDefault), "cudaHostAlloc");
  return address;
}

void CudaDevice::pinned_free(void* address, std::size_t /*nbytes*/) {
  check(cudaFreeHost(address), "cudaFreeHost");
}

void CudaDevice::host_register(void* address, std::size_t nbytes, HostAccess access) {
  const SelectDevice selected(info_.ordinal);
  const unsigned flags =
      access == HostAccess::kReadOnly ? cudaHostRegisterReadOnly : cudaHostRegisterDefault;
  check(cudaHostRegister(address, nbytes, flags), "cudaHostRegister");
}

void CudaDevice::host_unregister(void* address) {
  const SelectDevice selected(info_.ordinal);
  check(cudaHostUnregister(address), "cudaHostUnregister");
}

void CudaDevice::fill(void* address, std::uint8_t value, std::size_t nbytes, StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  check(cudaMemsetAsync(address, value, nbytes, native(stream)), "cudaMemsetAsync");
}

void CudaDevice::copy(void* target, const void* source, std::size_t nbytes, StreamHandle stream) {
  const SelectDevice selected(info_.ordinal);
  check(cudaMemcpyAsync(target, source, nbytes, cudaMemcpyDefault, native(stream)),
        "cudaMemcpyAsync");
}

}  // namespace penstock
