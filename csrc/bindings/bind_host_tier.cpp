#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bindings.hpp"
#include "host_tier/mapped_tier.hpp"
#include "host_tier/pinned_tier.hpp"
#include "host_tier/stream_tier.hpp"

namespace py = pybind11;

namespace penstock {
namespace {
using ExtentTuple = std::tuple<std::size_t, std::uint64_t, std::size_t, std::size_t>;
Source source_of(const std::vector<std::string>& paths, const std::vector<ExtentTuple>& extents) {
  Source source;
  source.paths = paths;
  for (const auto& [file, file_offset, region_offset, nbytes] : extents) {
    source.extents.push_back({file, file_offset, region_offset, nbytes});
  }
  return source;
}
}  // namespace

void bind_host_tier(py::module_& module) {
  using Extents = std::vector<ExtentTuple>;
  using Paths = std::vector<std::string>;
  const py::call_guard<py::gil_scoped_release> without_gil;
  py::class_<HostTierStats>(module, "HostTierStats", "What a tier holds and has done, in bytes.")
      .def_readonly("pinned_bytes", &HostTierStats::pinned_bytes)
      .def_readonly("mapped_bytes", &HostTierStats::mapped_bytes)
      .def_readonly("read_bytes", &HostTierStats::read_bytes);
  py::class_<HostTier, std::shared_ptr<HostTier>>(module, "HostTier", "Where bytes wait.")
      .def_property_readonly("kind", &HostTier::kind)
      .def_property_readonly("nbytes", &HostTier::nbytes)
      .def_property_readonly("page_size", &HostTier::page_size)
      .def_property_readonly("page_count", &HostTier::page_count)
      .def("write", [](HostTier& tier, std::size_t offset, const py::buffer& source) {
            const py::buffer_info bytes = source.request();
            const std::size_t nbytes = contiguous_bytes(bytes);
            const py::gil_scoped_release release;
            tier.write(offset, bytes.ptr, nbytes);
          }, py::arg("offset"), py::arg("source"))
      .def("wait_for", &HostTier::wait_for, py::arg("limit"), without_gil)
      .def_property_readonly("total_bytes", &HostTier::total_bytes)
      .def_property_readonly("done_bytes", &HostTier::done_bytes)
      .def("expect", &HostTier::expect, py::arg("order"), without_gil)
      .def("read", [](HostTier& tier, std::size_t offset, std::size_t nbytes) {
            std::string bytes(nbytes, '\0');
            { const py::gil_scoped_release release; tier.read(offset, bytes.data(), nbytes); }
            return py::bytes(bytes);
          }, py::arg("offset"), py::arg("nbytes"))
      .def_property_readonly("address", [](HostTier& tier) -> py::object {
            if (tier.address() == nullptr) return py::none();
            return py::int_(reinterpret_cast<std::uintptr_t>(tier.address()));
          })
      .def("stats", &HostTier::stats);
  py::class_<PinnedTier, HostTier, std::shared_ptr<PinnedTier>>(module, "PinnedTier", "x")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size, const Paths& paths, const Extents& extents, std::size_t threads) {
        return std::make_shared<PinnedTier>(std::move(device), nbytes, page_size, source_of(paths, extents), threads); }),
        py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"), py::arg("extents"), py::arg("threads"));
  py::class_<MappedTier, HostTier, std::shared_ptr<MappedTier>>(module, "MappedTier", "x")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size, const Paths& paths, const Extents& extents, std::chrono::milliseconds limit) {
        return std::make_shared<MappedTier>(std::move(device), nbytes, page_size, source_of(paths, extents), limit); }),
        py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"), py::arg("extents"), py::arg("limit"));
  py::class_<StreamTier, HostTier, std::shared_ptr<StreamTier>>(module, "StreamTier", "x")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size, const Paths& paths, const Extents& extents, std::size_t ring, std::size_t threads) {
        return std::make_shared<StreamTier>(std::move(device), nbytes, page_size, source_of(paths, extents), ring, threads); }),
        py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"), py::arg("extents"), py::arg("ring_bytes"), py::arg("threads"));
}
}  // namespace penstock
