#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "dlpack/capsule.hpp"
#include "managed/managed_pager.hpp"

namespace py = pybind11;

namespace penstock {

void bind_pager(py::module_& module) {
  using Pages = std::vector<PageIndex>;
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::native_enum<Access>(module, "Access", "enum.Enum", "How managed memory is used.")
      .value("read_mostly", Access::kReadMostly)
      .value("read_write", Access::kReadWrite)
      .finalize();

  py::class_<PagerStats>(module, "PagerStats", "What a pager has done since it was made.")
      .def_readonly("loaded_bytes", &PagerStats::loaded_bytes)
      .def_readonly("evicted_bytes", &PagerStats::evicted_bytes)
      .def_readonly("hits", &PagerStats::hits)
      .def_readonly("demand_loads", &PagerStats::demand_loads)
      .def_readonly("ahead_loads", &PagerStats::ahead_loads)
      .def_readonly("ahead_declined", &PagerStats::ahead_declined)
      .def_readonly("ahead_failed", &PagerStats::ahead_failed);

  py::class_<RegionStats>(module, "RegionStats", "Pages of one region by where they are.")
      .def_readonly("resident_bytes", &RegionStats::resident_bytes)
      .def_readonly("resident_pages", &RegionStats::resident_pages)
      .def_readonly("pinned_pages", &RegionStats::pinned_pages)
      .def_readonly("in_place_bytes", &RegionStats::in_place_bytes);

  py::class_<Region, std::shared_ptr<Region>>(module, "Region",
                                              "One range of device addresses, divided into pages.")
      .def_property_readonly(
          "address",
          [](const Region& region) { return reinterpret_cast<std::uintptr_t>(region.address()); })
      .def_property_readonly("nbytes", &Region::nbytes)
      .def_property_readonly("page_size", &Region::page_size)
      .def_property_readonly("page_count", &Region::page_count)
      .def("pages_of", &Region::pages_of, py::arg("start"), py::arg("nbytes"),
           "Return the pages that a byte range touches.")
      .def("stats", &Region::stats, "Count pages by where they are.")
      .def(
          "begin",
          [](Region& region, const Pages& pages, std::uintptr_t stream) {
            region.begin(pages, stream_of(stream));
          },
          py::arg("pages"), py::arg("stream") = 0, without_gil,
          "Bring pages in, keep them, and order the stream after their loads.")
      .def(
          "end",
          [](Region& region, const Pages& pages, std::uintptr_t stream) {
            region.end(pages, stream_of(stream));
          },
          py::arg("pages"), py::arg("stream") = 0, without_gil,
          "Let go of pages once the stream's work so far has run.")
      .def("evict", &Region::evict, py::arg("pages"), without_gil,
           "Drop pages that are not in use; return bytes given back.")
      .def("flush", &Region::flush, without_gil,
           "Have all that was written where the host reads it; return when it is there.")
      .def(
          "dlpack",
          [](std::shared_ptr<Region> region, std::size_t offset, std::size_t nbytes) {
            return to_dlpack(std::move(region), offset, nbytes);
          },
          py::arg("offset"), py::arg("nbytes"),
          "Return a DLPack capsule over a byte range, as unsigned bytes.");

  py::class_<ManagedRegion, Region, FillTarget, std::shared_ptr<ManagedRegion>>(
      module, "ManagedRegion", "A region of managed memory.")
      .def_property_readonly("access", &ManagedRegion::access)
      .def(
          "write",
          [](ManagedRegion& region, std::size_t offset, const py::buffer& source) {
            const py::buffer_info bytes = source.request();
            const std::size_t nbytes = contiguous_bytes(bytes);
            const py::gil_scoped_release release;
            region.write(offset, bytes.ptr, nbytes);
          },
          py::arg("offset"), py::arg("source"),
          "Copy bytes in, making no page resident; a read-mostly region is filled before it loads.")
      .def(
          "resident_bytes",
          [](ManagedRegion& region) {
            return region.device().managed_resident(region.address(), region.nbytes());
          },
          without_gil, "Count resident bytes as the system does; None where it cannot tell.");

  py::class_<ManagedPager, std::shared_ptr<ManagedPager>> pager(
      module, "ManagedPager", "Decides which pages are resident, under a budget. Thread-safe.");
  pager.attr("batches_in_ring") = ManagedPager::kBatchesInRing;
  pager.attr("largest_batch") = ManagedPager::kLargestBatch;
  pager
      .def(py::init(&ManagedPager::create), py::arg("device"), py::arg("budget"),
           py::arg("page_size"))
      .def("reserve", &ManagedPager::reserve, py::arg("nbytes"), py::arg("access"), without_gil,
           "Reserve a region, nothing of it resident.")
      .def(
          "begin",
          [](ManagedPager& pager, ManagedRegion& region, const Pages& pages,
             std::uintptr_t stream) { pager.begin(region, pages, stream_of(stream)); },
          py::arg("region"), py::arg("pages"), py::arg("stream") = 0, without_gil,
          "Pin pages, load what is missing, order the stream after the loads.")
      .def(
          "end",
          [](ManagedPager& pager, ManagedRegion& region, const Pages& pages,
             std::uintptr_t stream) { pager.end(region, pages, stream_of(stream)); },
          py::arg("region"), py::arg("pages"), py::arg("stream") = 0, without_gil,
          "Unpin pages once the stream's work so far has run.")
      .def(
          "prefetch",
          [](ManagedPager& pager, ManagedRegion& region, const Pages& pages,
             std::uintptr_t stream) { return pager.prefetch(region, pages, stream_of(stream)); },
          py::arg("region"), py::arg("pages"), py::arg("stream") = 0, without_gil,
          "Load pages and order the stream after the loads; return bytes newly charged.")
      .def("prefetch_ahead", &ManagedPager::prefetch_ahead, py::arg("region"), py::arg("pages"),
           without_gil, "Ask for pages of a later step, where there is room; return at once.")
      .def("evict", &ManagedPager::evict, py::arg("region"), py::arg("pages"), without_gil,
           "Drop pages that are not pinned; return bytes given back.")
      .def("synchronize", &ManagedPager::synchronize, without_gil,
           "Wait for all that was asked so far.")
      .def("set_schedule", &ManagedPager::set_schedule, py::arg("region"), py::arg("steps"),
           "Replace the schedule: the pages that each step of a pass reads.")
      .def("advance", &ManagedPager::advance, py::arg("region"), py::arg("step"),
           "The next occurrence of a step begins now.")
      .def("set_active", &ManagedPager::set_active, py::arg("region"), py::arg("active"),
           "Mark a region as in use or idle.")
      .def("set_turn", &ManagedPager::set_turn, py::arg("region"), py::arg("turn"),
           "Say when others take a region's pages: lower turns first; None: never.")
      .def("keep", &ManagedPager::keep, py::arg("region"), py::arg("pages"), without_gil,
           "Replace the pages that a plan keeps; they go when no others are left.")
      .def("stats", &ManagedPager::stats)
      .def("region_stats", &ManagedPager::region_stats, py::arg("region"))
      .def_property_readonly("page_size", &ManagedPager::page_size);
}

}  // namespace penstock
