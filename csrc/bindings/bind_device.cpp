#include <pybind11/chrono.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "device/host/host_device.hpp"
#include "device/host/host_memory.hpp"
#include "device/link_rate.hpp"
#include "device/open/open_device.hpp"
#include "device/testing/faulty_device.hpp"

namespace py = pybind11;

namespace penstock {

void bind_device(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::native_enum<DeviceKind>(module, "DeviceKind", "enum.Enum", "What a device is made of.")
      .value("host", DeviceKind::kHost)
      .value("cuda", DeviceKind::kCuda)
      .finalize();

  py::class_<DeviceInfo>(module, "DeviceInfo", "What a device is; sizes in bytes.")
      .def_readonly("kind", &DeviceInfo::kind)
      .def_readonly("ordinal", &DeviceInfo::ordinal)
      .def_readonly("name", &DeviceInfo::name)
      .def_readonly("total_bytes", &DeviceInfo::total_bytes)
      .def_readonly("frame_granularity", &DeviceInfo::frame_granularity)
      .def_readonly("no_managed_reason", &DeviceInfo::no_managed_reason)
      .def_readonly("driver_version", &DeviceInfo::driver_version)
      .def_readonly("runtime_version", &DeviceInfo::runtime_version);

  py::class_<MemoryInfo>(module, "MemoryInfo",
                         "Physical memory in bytes, as the system reports it.")
      .def_readonly("free_bytes", &MemoryInfo::free_bytes)
      .def_readonly("total_bytes", &MemoryInfo::total_bytes);

  py::class_<ProcessMemory>(module, "ProcessMemory",
                            "What this process holds on a device, in bytes.")
      .def_readonly("bytes", &ProcessMemory::bytes)
      .def_readonly("whole_device", &ProcessMemory::whole_device);

  py::class_<Device, std::shared_ptr<Device>>(module, "Device", "A device; see open_device.")
      .def("info", &Device::info)
      .def("memory_info", &Device::memory_info, without_gil)
      .def("process_memory", &Device::process_memory, without_gil,
           "Read what this process holds on the device; None where nobody can tell.")
      .def_property_readonly("suppressed_count", &Device::suppressed_count,
                             "Failures where nothing could be raised.")
      .def_property_readonly("last_suppressed", &Device::last_suppressed);

  py::class_<HostDevice, Device, std::shared_ptr<HostDevice>>(
      module, "HostDevice", "The operating system's memory as a device.")
      .def(py::init<>());

  py::class_<FaultyDevice, Device, std::shared_ptr<FaultyDevice>>(
      module, "FaultyDevice", "A device around another one that fails or delays calls on demand.")
      .def(py::init<std::shared_ptr<Device>>(), py::arg("inner"))
      .def("fail_nth_call", &FaultyDevice::fail_nth_call, py::arg("nth"))
      .def("fail_nth_call_of", &FaultyDevice::fail_nth_call_of, py::arg("name"), py::arg("nth"))
      .def("delay_calls_of", &FaultyDevice::delay_calls_of, py::arg("name"), py::arg("delay"))
      .def("set_outside", &FaultyDevice::set_outside, py::arg("nbytes"),
           py::arg("whole_device") = false,
           "Have the process hold so much beside its frames; None for what the device says.")
      .def("reset", &FaultyDevice::reset)
      .def("calls", &FaultyDevice::calls)
      .def_property_readonly("fired", &FaultyDevice::fired);

  module.def("open_device", &open_device, py::arg("name"), without_gil,
             "Open \"cpu\", \"cuda\" or \"cuda:N\".");
  module.def("built_with_cuda", &built_with_cuda, "Whether this build has the CUDA device.");
  module.def("cuda_device_count", &cuda_device_count, "Count the CUDA devices one can use.");
  module.def("no_cuda_reason", &no_cuda_reason, "Say why there are none; empty if there are.");
  module.def("spill_directory", &spill_directory, "Where the host device puts evicted bytes.");
  module.def("measure_link_rate", &measure_link_rate, py::arg("device"), py::arg("nbytes"),
             py::arg("repeats") = 5, without_gil,
             "Measure the rate of copies from pinned memory, in bytes per second.");
}

}  // namespace penstock
