#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bindings/bindings.hpp"
#include "io/fill_job.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

using ExtentTuple = std::tuple<std::size_t, std::uint64_t, std::size_t, std::size_t>;

PageCache cache_use(bool keep_cached) {
  return keep_cached ? PageCache::kUse : PageCache::kSpare;
}

std::unique_ptr<FillJob> start_fill(std::shared_ptr<FillTarget> target,
                                    const std::vector<std::string>& paths,
                                    const std::vector<ExtentTuple>& extents, std::size_t threads,
                                    bool keep_cached) {
  std::vector<Extent> typed;
  typed.reserve(extents.size());
  for (const auto& [file, file_offset, region_offset, nbytes] : extents) {
    typed.push_back({file, file_offset, region_offset, nbytes});
  }
  return std::make_unique<FillJob>(std::move(target), paths, typed, threads,
                                   cache_use(keep_cached));
}

}  // namespace

void bind_loader(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<File>(module, "File", "A file open for reading, which must not change meanwhile.")
      .def(py::init([](const std::string& path, bool keep_cached) {
             return std::make_unique<File>(path, cache_use(keep_cached));
           }),
           py::arg("path"), py::arg("keep_cached") = false, without_gil,
           "Open. Unless `keep_cached`, what the page cache does not have now is read past it.")
      .def(
          "read",
          [](const File& file, std::uint64_t offset, const py::buffer& target) {
            const py::buffer_info bytes = target.request(true);
            const std::size_t nbytes = contiguous_bytes(bytes);
            const py::gil_scoped_release release;
            file.read(bytes.ptr, offset, nbytes);
          },
          py::arg("offset"), py::arg("target"), "Fill a buffer with the bytes from an offset on.");

  py::class_<FillTarget, std::shared_ptr<FillTarget>>(module, "FillTarget",
                                                      "Where a fill job puts what it reads.");

  py::class_<FillJob>(module, "FillJob",
                      "Reads extents of files into a region or a host tier, on threads.")
      .def(py::init(&start_fill), py::arg("target"), py::arg("paths"), py::arg("extents"),
           py::arg("threads"), py::arg("keep_cached") = false, without_gil,
           "Start. An extent is (file index, file offset, region offset, bytes).")
      .def("wait_for", &FillJob::wait_for, py::arg("limit"), without_gil,
           "Wait up to a time limit; return whether all bytes are in place.")
      .def("cancel", &FillJob::cancel)
      .def_property_readonly("total_bytes", &FillJob::total_bytes)
      .def_property_readonly("done_bytes", &FillJob::done_bytes);
}

}  // namespace penstock
