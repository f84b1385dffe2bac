#include "device/cuda/cuda_usage.hpp"

#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "error/error.hpp"

namespace penstock {

namespace {

// From NVML's interface, which is stable: nvml.h is not part of every toolkit.
using NvmlReturn = int;
using NvmlDevice = void*;
constexpr NvmlReturn kSuccess = 0;
constexpr NvmlReturn kInsufficientSize = 7;
constexpr unsigned long long kNotAvailable = ~0ULL;

struct NvmlMemory {
  unsigned long long total, free, used;
};

struct NvmlProcess {  // nvmlProcessInfo_t of the third version of the call
  unsigned int pid;
  unsigned long long used;
  unsigned int gpu_instance;
  unsigned int compute_instance;
};

struct Nvml {
  NvmlReturn (*init)();
  NvmlReturn (*by_uuid)(const char*, NvmlDevice*);
  NvmlReturn (*by_bus)(const char*, NvmlDevice*);
  NvmlReturn (*memory)(NvmlDevice, NvmlMemory*);
  NvmlReturn (*processes)(NvmlDevice, unsigned int*, NvmlProcess*);  // may be null
};

// Functions of the driver that make no context.
struct Driver {
  decltype(&cuInit) init;
  decltype(&cuDeviceGet) get;
  decltype(&cuDeviceGetUuid) uuid;
  decltype(&cuDeviceGetPCIBusId) bus;
  decltype(&cuDevicePrimaryCtxGetState) context_state;
};

template <typename Function>
bool look_up(void* library, Function& function, const char* symbol) {
  function = reinterpret_cast<Function>(::dlsym(library, symbol));
  return function != nullptr;
}

const Nvml* load_nvml() {
  static Nvml table{};
  void* library = ::dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  look_up(library, table.processes, "nvmlDeviceGetComputeRunningProcesses_v3");
  const bool complete = look_up(library, table.init, "nvmlInit_v2") &&
                        look_up(library, table.by_uuid, "nvmlDeviceGetHandleByUUID") &&
                        look_up(library, table.by_bus, "nvmlDeviceGetHandleByPciBusId_v2") &&
                        look_up(library, table.memory, "nvmlDeviceGetMemoryInfo");
  return complete && table.init() == kSuccess ? &table : nullptr;  // never shut down
}

const Nvml* nvml() {
  static const Nvml* const table = load_nvml();
  return table;
}

const Driver* load_driver() {
  static Driver table{};
  void* library = ::dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  const bool complete = look_up(library, table.init, "cuInit") &&
                        look_up(library, table.get, "cuDeviceGet") &&
                        look_up(library, table.uuid, "cuDeviceGetUuid_v2") &&
                        look_up(library, table.bus, "cuDeviceGetPCIBusId") &&
                        look_up(library, table.context_state, "cuDevicePrimaryCtxGetState");
  return complete && table.init(0) == CUDA_SUCCESS ? &table : nullptr;
}

std::string text_of(const CUuuid& uuid) {
  std::string text;
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(uuid.bytes[i]));
    text += digits;
  }
  return text;
}

// By what names the GPU, or the part of one, wherever the process's environment has it in its
// order: CUDA and NVML count differently.
NvmlDevice find_device(const Nvml& library, const Driver& driver, CUdevice device) {
  NvmlDevice found = nullptr;
  CUuuid uuid{};
  if (driver.uuid(&uuid, device) == CUDA_SUCCESS) {
    for (const char* kind : {"GPU-", "MIG-"}) {
      if (library.by_uuid((kind + text_of(uuid)).c_str(), &found) == kSuccess) return found;
    }
  }
  char bus[32] = {};
  if (driver.bus(bus, sizeof bus, device) != CUDA_SUCCESS) return nullptr;
  return library.by_bus(bus, &found) == kSuccess ? found : nullptr;
}

std::size_t device_used(const Nvml& library, NvmlDevice device) {
  NvmlMemory memory{};
  const NvmlReturn status = library.memory(device, &memory);
  if (status != kSuccess) {
    throw DeviceError("nvmlDeviceGetMemoryInfo", status, "NVML cannot read the device's memory");
  }
  return static_cast<std::size_t>(memory.used);
}

// What NVML lists for this process; none where it is not listed, or without a figure.
std::optional<std::size_t> process_used(const Nvml& library, NvmlDevice device) {
  if (library.processes == nullptr) return std::nullopt;
  std::vector<NvmlProcess> listed(32);
  for (int attempt = 0; attempt < 4; ++attempt) {
    auto count = static_cast<unsigned int>(listed.size());
    const NvmlReturn status = library.processes(device, &count, listed.data());
    if (status == kInsufficientSize) {  // `count` is how many there are; more may come
      listed.resize(static_cast<std::size_t>(count) + 32);
      continue;
    }
    if (status != kSuccess) return std::nullopt;
    listed.resize(count);
    std::optional<std::size_t> used;
    for (const NvmlProcess& process : listed) {
      if (process.pid != static_cast<unsigned int>(::getpid())) continue;
      if (process.used == kNotAvailable) return std::nullopt;
      used = used.value_or(0) + static_cast<std::size_t>(process.used);
    }
    return used;
  }
  return std::nullopt;
}

struct FirstLook {
  NvmlDevice device = nullptr;
  std::size_t baseline = 0;
  bool listed = false;
};

FirstLook look(int ordinal) {
  FirstLook seen;
  const Nvml* library = nvml();
  static const Driver* const driver = load_driver();
  CUdevice device = 0;
  if (library == nullptr || driver == nullptr || driver->get(&device, ordinal) != CUDA_SUCCESS) {
    return seen;
  }
  seen.device = find_device(*library, *driver, device);
  unsigned int flags = 0;
  int active = 1;
  if (driver->context_state(device, &flags, &active) != CUDA_SUCCESS || active != 0) return seen;
  if (seen.device == nullptr) return seen;
  seen.baseline = device_used(*library, seen.device);
  seen.listed = process_used(*library, seen.device).has_value();
  return seen;
}

// Once for each GPU: later there is a context.
FirstLook first_look(int ordinal) {
  static std::mutex mutex;
  static auto* const looks = new std::map<int, FirstLook>;  // for as long as the process lives
  const std::lock_guard lock(mutex);
  const auto known = looks->find(ordinal);
  return known != looks->end() ? known->second
                               : looks->emplace(ordinal, look(ordinal)).first->second;
}

}  // namespace

CudaUsage::CudaUsage(int ordinal) {
  const FirstLook seen = first_look(ordinal);
  device_ = seen.device;
  baseline_ = seen.baseline;
  listed_before_ = seen.listed;
}

std::optional<ProcessMemory> CudaUsage::read() {
  if (device_ == nullptr) return std::nullopt;
  const Nvml& library = *nvml();
  if (source_ != Source::kDevice && !listed_before_) {
    if (const auto own = process_used(library, device_)) {
      source_ = Source::kProcess;
      return ProcessMemory{*own, false};
    }
    if (source_ == Source::kProcess) {
      throw DeviceError("nvmlDeviceGetComputeRunningProcesses_v3", 0,
                        "NVML does not list this process any more");
    }
  }
  source_ = Source::kDevice;
  const std::size_t used = device_used(library, device_);
  return ProcessMemory{used > baseline_ ? used - baseline_ : 0, true};
}

}  // namespace penstock
