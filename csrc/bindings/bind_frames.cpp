#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/bindings.hpp"
#include "frame_pool/frame_pool.hpp"
#include "frames/frames_region.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

// A slot of None is a frame of the page's own.
void arrange(FramesRegion& region, const std::vector<std::optional<std::uint32_t>>& slots,
             std::size_t ring) {
  Arrangement arrangement;
  arrangement.ring = ring;
  arrangement.slot.reserve(slots.size());
  for (const auto& slot : slots) {
    arrangement.slot.push_back(slot.value_or(Arrangement::kOwnFrame));
  }
  region.arrange(arrangement);
}

}  // namespace

void bind_frames(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<FramePool, std::shared_ptr<FramePool>>(
      module, "FramePool", "Makes frames of device memory, under a budget. Thread-safe.")
      .def(py::init(&FramePool::create), py::arg("device"), py::arg("budget"),
           py::arg("frame_size"))
      .def_property_readonly("frame_size", &FramePool::frame_size)
      .def("beside", &FramePool::beside, py::arg("frame_size"),
           "Make a pool of frames of another size, under the same budget, with the same sources.")
      .def("reclaim_retired", &FramePool::reclaim_retired, without_gil,
           "Take back what those hold who are in nobody's charge any more.")
      .def(
          "make_room",
          [](const FramePool& pool, std::size_t nbytes) { return pool.make_room(nbytes, nullptr); },
          py::arg("nbytes"), without_gil,
          "Ask those who hold frames for room; return whether the bytes can be charged now.");

  py::class_<FramesStats>(module, "FramesStats", "What a region of frames has done.")
      .def_readonly("loaded_bytes", &FramesStats::loaded_bytes)
      .def_readonly("written_back_bytes", &FramesStats::written_back_bytes)
      .def_readonly("demand_loads", &FramesStats::demand_loads)
      .def_readonly("remaps", &FramesStats::remaps);

  py::class_<FramesRegion, Region, std::shared_ptr<FramesRegion>>(
      module, "FramesRegion", "A region under which frames are mapped.")
      .def(py::init(&FramesRegion::create), py::arg("pool"), py::arg("tier"), without_gil)
      .def("arrange", &arrange, py::arg("slots"), py::arg("ring"), without_gil,
           "Say which pages share a frame; a slot of None is a frame of the page's own.")
      .def_property_readonly("frame_count", &FramesRegion::frame_count)
      .def("set_writable", &FramesRegion::set_writable, py::arg("writable"),
           "Copy pages that were in use back to the host tier before they leave their place.")
      .def("set_verify", &FramesRegion::set_verify, py::arg("verify"),
           "Compare every load with its source, and overwrite pages that were used.")
      .def("prepare_capture", &FramesRegion::prepare_capture, without_gil,
           "Wait for all work, and forget what is in shared frames.")
      .def(
          "begin_capture",
          [](FramesRegion& region, std::uintptr_t stream) {
            region.begin_capture(stream_of(stream));
          },
          py::arg("stream"), without_gil, "Make copies part of what the stream captures.")
      .def(
          "end_capture",
          [](FramesRegion& region, std::uintptr_t stream) {
            region.end_capture(stream_of(stream));
          },
          py::arg("stream"), without_gil, "Order the stream after all captured copies.")
      .def(
          "before_replay",
          [](FramesRegion& region, std::uintptr_t stream, std::uint64_t mappings) {
            region.before_replay(stream_of(stream), mappings);
          },
          py::arg("stream"), py::arg("mappings"), without_gil,
          "Order a replay after all other uses, if pages are where they were.")
      .def_property_readonly("mappings", &FramesRegion::mappings,
                             "Grows whenever a page is mapped elsewhere.")
      .def("retire", &FramesRegion::retire, without_gil,
           "Say that nobody is in charge of the model any more.")
      .def("set_protected", &FramesRegion::set_protected, py::arg("is_protected"), without_gil,
           "Say whether nothing is given to others.")
      .def("set_active", &FramesRegion::set_active, py::arg("active"), without_gil,
           "Say whether the model is in use; others take all frames of one that is not.")
      .def(
          "after_replay",
          [](FramesRegion& region, std::uintptr_t stream) {
            region.after_replay(stream_of(stream));
          },
          py::arg("stream"), without_gil, "Order all other uses after a replay.")
      .def("frames_stats", &FramesRegion::frames_stats);
}

}  // namespace penstock
