#include "dlpack/capsule.hpp"

#include <cstdint>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace penstock {

namespace {

// Structures and codes of the specification.
struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
constexpr std::int32_t kDLCPU = 1;
constexpr std::int32_t kDLCUDA = 2;
constexpr std::uint8_t kDLUInt = 1;

// The managed tensor and all that it points to, in one allocation.
struct Exported {
  DLManagedTensor managed{};
  std::int64_t shape = 0;
  std::int64_t stride = 1;
  std::shared_ptr<Region> region;
  std::shared_ptr<void> owner;
};

void delete_exported(DLManagedTensor* tensor) {
  const std::unique_ptr<Exported> owned(static_cast<Exported*>(tensor->manager_ctx));
}

// Runs where nobody took the tensor out of the capsule; who does, renames it.
void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  auto* tensor = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
  tensor->deleter(tensor);
}

}  // namespace

py::capsule to_dlpack(std::shared_ptr<Region> region, std::size_t offset, std::size_t nbytes,
                      std::shared_ptr<void> owner) {
  if (nbytes == 0) throw std::invalid_argument("a tensor without bytes has no place in a region");
  static_cast<void>(region->pages_of(offset, nbytes));  // throws outside the region
  const DeviceInfo device = region->device().info();
  auto exported = std::make_unique<Exported>();
  exported->shape = static_cast<std::int64_t>(nbytes);
  DLTensor& tensor = exported->managed.dl_tensor;
  tensor.data = region->address() + offset;
  tensor.device = {device.kind == DeviceKind::kCuda ? kDLCUDA : kDLCPU, device.ordinal};
  tensor.ndim = 1;
  tensor.dtype = {kDLUInt, 8, 1};
  tensor.shape = &exported->shape;
  tensor.strides = &exported->stride;
  exported->region = std::move(region);
  exported->owner = std::move(owner);
  exported->managed.manager_ctx = exported.get();
  exported->managed.deleter = delete_exported;
  py::capsule capsule(static_cast<const void*>(&exported->managed), "dltensor", delete_capsule);
  static_cast<void>(exported.release());  // the capsule owns it now
  return capsule;
}

}  // namespace penstock
