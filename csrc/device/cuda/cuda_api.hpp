// What differs between CUDA toolkits 12.4 and 13, and the driver calls. Driver functions are looked
// up at run time through the runtime's entry-point query, so that nothing links to libcuda and the
// core loads where there is none.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace penstock::cuda_api {

/// @throws DeviceError naming `call` unless `status` is success; clears the runtime's last error.
void check(cudaError_t status, const char* call);
void check(CUresult status, const char* call);

/// Where advice and prefetches point to: a device's ordinal, or the host.
inline constexpr int kHostLocation = -1;
void mem_advise(const void* address, std::size_t nbytes, cudaMemoryAdvise advice, int location);
void mem_prefetch(const void* address, std::size_t nbytes, int location, cudaStream_t stream);

/// The virtual memory management functions of the driver.
struct Driver {
  decltype(&cuGetErrorString) get_error_string;
  decltype(&cuMemAddressReserve) address_reserve;
  decltype(&cuMemAddressFree) address_free;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemGetAllocationGranularity) granularity;
};

/// @throws DeviceError where the driver lacks one of them.
const Driver& driver();

}  // namespace penstock::cuda_api
