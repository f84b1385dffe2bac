#include "device/cuda/cuda_api.hpp"

#include <string>

#include "error/error.hpp"

namespace penstock::cuda_api {

namespace {

#if CUDART_VERSION >= 13000
cudaMemLocation location_of(int location) {
  cudaMemLocation result{};
  result.type = location == kHostLocation ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  result.id = location == kHostLocation ? 0 : location;
  return result;
}
#else
int location_of(int location) {
  return location == kHostLocation ? cudaCpuDeviceId : location;
}
#endif

template <typename Function>
void look_up(Function& function, const char* symbol) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  check(cudaGetDriverEntryPointByVersion(symbol, &entry, 12000, cudaEnableDefault, &found),
        "cudaGetDriverEntryPointByVersion");
#else
  check(cudaGetDriverEntryPoint(symbol, &entry, cudaEnableDefault, &found),
        "cudaGetDriverEntryPoint");
#endif
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    throw DeviceError(symbol, static_cast<int>(found),
                      "the driver has no such function; install a newer NVIDIA driver");
  }
  function = reinterpret_cast<Function>(entry);
}

Driver load() {
  Driver table{};
  look_up(table.get_error_string, "cuGetErrorString");
  look_up(table.address_reserve, "cuMemAddressReserve");
  look_up(table.address_free, "cuMemAddressFree");
  look_up(table.create, "cuMemCreate");
  look_up(table.release, "cuMemRelease");
  look_up(table.map, "cuMemMap");
  look_up(table.unmap, "cuMemUnmap");
  look_up(table.set_access, "cuMemSetAccess");
  look_up(table.granularity, "cuMemGetAllocationGranularity");
  return table;
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw DeviceError(call, static_cast<int>(status), cudaGetErrorString(status));
}

void check(CUresult status, const char* call) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().get_error_string(status, &text);
  throw DeviceError(call, static_cast<int>(status), text != nullptr ? text : "unknown error");
}

void mem_advise(const void* address, std::size_t nbytes, cudaMemoryAdvise advice, int location) {
  check(cudaMemAdvise(address, nbytes, advice, location_of(location)), "cudaMemAdvise");
}

void mem_prefetch(const void* address, std::size_t nbytes, int location, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  check(cudaMemPrefetchAsync(address, nbytes, location_of(location), 0, stream),
        "cudaMemPrefetchAsync");
#else
  check(cudaMemPrefetchAsync(address, nbytes, location_of(location), stream),
        "cudaMemPrefetchAsync");
#endif
}

const Driver& driver() {
  static const Driver table = load();
  return table;
}

}  // namespace penstock::cuda_api
