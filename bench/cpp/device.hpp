// The device that benchmarks run on: $PENSTOCK_BENCH_DEVICE ("cpu", "cuda", "cuda:N"), else CUDA
// where there is any.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>

#include "device/open/open_device.hpp"

namespace penstock {

inline std::shared_ptr<Device> bench_device() {
  const char* chosen = std::getenv("PENSTOCK_BENCH_DEVICE");
  if (chosen != nullptr && *chosen != '\0') return open_device(chosen);
  return open_device(cuda_device_count() > 0 ? "cuda" : "cpu");
}

}  // namespace penstock
