#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "bindings/bindings.hpp"
#include "host_tier/mapped_tier.hpp"
#include "host_tier/pinned_tier.hpp"
#include "host_tier/stream_tier.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

using std::chrono::milliseconds;
using Paths = std::vector<std::string>;
using ExtentTuples = std::vector<std::tuple<std::size_t, std::uint64_t, std::size_t, std::size_t>>;

Source source_of(const Paths& paths, const ExtentTuples& extents) {
  Source source{paths, {}};
  source.extents.reserve(extents.size());
  for (const auto& [file, file_offset, region_offset, nbytes] : extents) {
    source.extents.push_back({file, file_offset, region_offset, nbytes});
  }
  return source;
}

py::bytes read_bytes(HostTier& tier, std::size_t offset, std::size_t nbytes) {
  if (offset > tier.nbytes() || nbytes > tier.nbytes() - offset) {
    throw std::out_of_range("read: bytes outside the host tier of " +
                            std::to_string(tier.nbytes()) + " bytes");
  }
  PyObject* bytes = PyBytes_FromStringAndSize(nullptr, static_cast<py::ssize_t>(nbytes));
  if (bytes == nullptr) throw py::error_already_set();
  auto owned = py::reinterpret_steal<py::bytes>(bytes);
  char* target = PyBytes_AS_STRING(bytes);
  const py::gil_scoped_release release;
  std::memset(target, 0, nbytes);  // what nobody gave reads as zeros
  tier.read(offset, target, nbytes);
  return owned;
}

}  // namespace

void bind_host_tier(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<HostTierStats>(module, "HostTierStats", "What a host tier holds and has done.")
      .def_readonly("pinned_bytes", &HostTierStats::pinned_bytes)
      .def_readonly("mapped_bytes", &HostTierStats::mapped_bytes)
      .def_readonly("read_bytes", &HostTierStats::read_bytes);

  py::class_<HostTier, std::shared_ptr<HostTier>>(
      module, "HostTier", "Where a model's bytes wait before they are copied to the device.")
      .def_property_readonly("kind", &HostTier::kind)
      .def_property_readonly("nbytes", &HostTier::nbytes)
      .def_property_readonly("page_size", &HostTier::page_size)
      .def_property_readonly("page_count", &HostTier::page_count)
      .def(
          "write",
          [](HostTier& tier, std::size_t offset, const py::buffer& source) {
            const py::buffer_info bytes = source.request();
            const std::size_t nbytes = contiguous_bytes(bytes);
            const py::gil_scoped_release release;
            tier.write(offset, bytes.ptr, nbytes);
          },
          py::arg("offset"), py::arg("source"), "Put bytes in place that no file has.")
      .def("wait_for", &HostTier::wait_for, py::arg("limit"), without_gil,
           "Wait up to a time limit; return whether pages can be fetched.")
      .def("expect", &HostTier::expect, py::arg("order"), without_gil,
           "Say which pages will be fetched, in order, over and over.")
      .def_property_readonly("total_bytes", &HostTier::total_bytes)
      .def_property_readonly("done_bytes", &HostTier::done_bytes)
      .def("read", &read_bytes, py::arg("offset"), py::arg("nbytes"), "Copy bytes out.")
      .def_property_readonly(
          "address",
          [](HostTier& tier) {
            const auto address = reinterpret_cast<std::uintptr_t>(tier.address());
            return address == 0 ? std::nullopt : std::optional(address);
          },
          "First byte, where host memory holds all bytes in order; None elsewhere.")
      .def("stats", &HostTier::stats);

  py::class_<PinnedTier, HostTier, std::shared_ptr<PinnedTier>>(
      module, "PinnedTier", "A host tier in pinned memory, filled once from files.")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Paths& paths, const ExtentTuples& extents, std::size_t threads,
                       bool keep_cached) {
             return std::make_shared<PinnedTier>(std::move(device), nbytes, page_size,
                                                 source_of(paths, extents), threads,
                                                 keep_cached ? PageCache::kUse : PageCache::kSpare);
           }),
           py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"),
           py::arg("extents"), py::arg("threads") = 0, py::arg("keep_cached") = false, without_gil,
           "Start to fill. An extent is (file index, file offset, region offset, bytes).");

  py::class_<MappedTier, HostTier, std::shared_ptr<MappedTier>>(
      module, "MappedTier", "A host tier in the page cache, registered with the device.")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Paths& paths, const ExtentTuples& extents, milliseconds limit,
                       std::size_t threads) {
             return std::make_shared<MappedTier>(std::move(device), nbytes, page_size,
                                                 source_of(paths, extents), limit, threads);
           }),
           py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"),
           py::arg("extents"), py::arg("limit"), py::arg("threads") = 0, without_gil,
           "Start to map. `limit` is how long one call that registers may take.");

  py::class_<StreamTier, HostTier, std::shared_ptr<StreamTier>>(
      module, "StreamTier", "A host tier on disk, behind a pinned ring of buffers.")
      .def(py::init([](std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Paths& paths, const ExtentTuples& extents, std::size_t ring_bytes,
                       std::size_t threads) {
             return std::make_shared<StreamTier>(std::move(device), nbytes, page_size,
                                                 source_of(paths, extents), ring_bytes, threads);
           }),
           py::arg("device"), py::arg("nbytes"), py::arg("page_size"), py::arg("paths"),
           py::arg("extents"), py::arg("ring_bytes"), py::arg("threads") = 0, without_gil,
           "Start the readers.");
}

}  // namespace penstock
