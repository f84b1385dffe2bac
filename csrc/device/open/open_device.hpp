// Opens devices by name; the one place that knows which kinds this build has.
#pragma once

#include <memory>
#include <string>

#include "device/device.hpp"

namespace penstock {

/// Whether this build has the CUDA device in it.
bool built_with_cuda() noexcept;

/// Number of CUDA devices that this process can use; 0 without a driver, a GPU, or CUDA in the
/// build.
int cuda_device_count() noexcept;

/// Why `cuda_device_count()` is 0; empty if it is not.
std::string no_cuda_reason();

/// Opens "cpu", "cuda" or "cuda:N".
/// @throws std::invalid_argument for another name, DeviceError for a device that is not there.
std::shared_ptr<Device> open_device(const std::string& name);

}  // namespace penstock
