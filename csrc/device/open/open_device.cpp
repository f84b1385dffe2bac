#include "device/open/open_device.hpp"

#include <stdexcept>

#include "device/host/host_device.hpp"
#include "error/error.hpp"
#ifdef PENSTOCK_HAS_CUDA
#include "device/cuda/cuda_device.hpp"
#endif

namespace penstock {

namespace {

// "cuda" and "cuda:N" to N; -1 for any other name.
int cuda_ordinal(const std::string& name) {
  static const std::string kPrefix = "cuda:";
  if (name == "cuda") return 0;
  if (name.rfind(kPrefix, 0) != 0 || name.size() == kPrefix.size() || name.size() > 9) return -1;
  const std::string digits = name.substr(kPrefix.size());
  if (digits.find_first_not_of("0123456789") != std::string::npos) return -1;
  return std::stoi(digits);
}

}  // namespace

bool built_with_cuda() noexcept {
#ifdef PENSTOCK_HAS_CUDA
  return true;
#else
  return false;
#endif
}

int cuda_device_count() noexcept {
#ifdef PENSTOCK_HAS_CUDA
  return CudaDevice::count();
#else
  return 0;
#endif
}

std::string no_cuda_reason() {
#ifdef PENSTOCK_HAS_CUDA
  return CudaDevice::unavailable_reason();
#else
  return "this build has no CUDA device: no CUDA toolkit 12.4 or newer was found when it was built";
#endif
}

std::shared_ptr<Device> open_device(const std::string& name) {
  if (name == "cpu") return std::make_shared<HostDevice>();
  const int ordinal = cuda_ordinal(name);
  if (ordinal < 0) {
    throw std::invalid_argument("unknown device \"" + name +
                                "\": use \"cpu\", \"cuda\" or \"cuda:N\"");
  }
  const int count = cuda_device_count();
  if (ordinal >= count) {
    const std::string reason =
        count == 0 ? no_cuda_reason()
                   : "this process sees " + std::to_string(count) + " CUDA device(s)";
    throw DeviceError("open_device(\"" + name + "\")", 0,
                      reason + ". Use device=\"cpu\", or make the GPU visible");
  }
#ifdef PENSTOCK_HAS_CUDA
  return std::make_shared<CudaDevice>(ordinal);
#else
  return nullptr;  // not reached: the count is 0
#endif
}

}  // namespace penstock
