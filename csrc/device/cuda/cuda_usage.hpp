// What this process holds on a GPU, as NVIDIA's management library (NVML) has it. The library comes
// with the driver, is loaded at run time, and needs no CUDA context, so that the memory that was
// taken before this process made its context can be read: each GPU's is, once in a process, when
// its first object is made.
//
// Where NVML lists this process, its own figure is taken. In containers it is often not listed:
// then the figure is what is taken on the whole device now, less what was taken before the context,
// so that what other processes take meanwhile counts as ours, and what they let go of hides as much
// of ours. Which of both it is, is decided by the first reading and stays. Thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "device/device.hpp"

namespace penstock {

class CudaUsage {
 public:
  /// @param ordinal  A device that exists. Where its context was made already, all that is taken on
  ///                 the device counts as ours.
  explicit CudaUsage(int ordinal);

  /// None where there is no NVML, or it does not know the device. @throws DeviceError
  std::optional<ProcessMemory> read();

 private:
  enum class Source : std::uint8_t { kUnknown, kProcess, kDevice };

  void* device_ = nullptr;      // an nvmlDevice_t; null where there is none
  std::size_t baseline_ = 0;    // bytes taken on the device before the context
  bool listed_before_ = false;  // under our number, before there was a context: somebody else
  std::atomic<Source> source_{Source::kUnknown};
};

}  // namespace penstock
