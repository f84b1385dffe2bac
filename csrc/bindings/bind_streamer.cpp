#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "streamer/streamer.hpp"

namespace py = pybind11;

namespace penstock {

void bind_streamer(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::native_enum<SpanKind>(module, "SpanKind", "enum.Enum", "What took time.")
      .value("pass_", SpanKind::kPass)
      .value("step", SpanKind::kStep)
      .value("stall", SpanKind::kStall)
      .value("load", SpanKind::kLoad)
      .value("evict", SpanKind::kEvict)
      .finalize();

  py::class_<Span>(module, "Span", "Something that took time; seconds since the first pass.")
      .def_readonly("kind", &Span::kind)
      .def_readonly("id", &Span::id)
      .def_readonly("count", &Span::count)
      .def_readonly("start", &Span::start)
      .def_readonly("seconds", &Span::seconds);

  py::class_<PassStats>(module, "PassStats", "Figures of one pass.")
      .def_readonly("seconds", &PassStats::seconds)
      .def_readonly("stall_seconds", &PassStats::stall_seconds)
      .def_readonly("longest_stall_step", &PassStats::longest_stall_step)
      .def_readonly("longest_stall_seconds", &PassStats::longest_stall_seconds)
      .def_readonly("loaded_bytes", &PassStats::loaded_bytes)
      .def_readonly("misses", &PassStats::misses)
      .def_readonly("unscheduled", &PassStats::unscheduled);

  py::class_<StreamerStats>(module, "StreamerStats", "What a streamer has done.")
      .def_readonly("passes", &StreamerStats::passes)
      .def_readonly("steps", &StreamerStats::steps)
      .def_readonly("unscheduled", &StreamerStats::unscheduled)
      .def_readonly("misses", &StreamerStats::misses)
      .def_readonly("loaded_bytes", &StreamerStats::loaded_bytes);

  py::class_<Streamer, std::shared_ptr<Streamer>>(module, "Streamer",
                                                  "Runs a model through its region, step by step.")
      .def(py::init<std::shared_ptr<Region>>(), py::arg("region"))
      .def("define", &Streamer::define, py::arg("step"), py::arg("pages"), py::arg("name") = "step",
           without_gil, "Say which pages a step reads.")
      .def("follow", &Streamer::follow, py::arg("order"), py::arg("pages"), without_gil,
           "Expect steps in this order; give all pages in use at each place of it.")
      .def(
          "begin_pass",
          [](Streamer& streamer, std::uintptr_t stream) { streamer.begin_pass(stream_of(stream)); },
          py::arg("stream") = 0, without_gil)
      .def(
          "end_pass",
          [](Streamer& streamer, std::uintptr_t stream) { streamer.end_pass(stream_of(stream)); },
          py::arg("stream") = 0, without_gil)
      .def(
          "begin",
          [](Streamer& streamer, StepId step, std::uintptr_t stream) {
            streamer.begin(step, stream_of(stream));
          },
          py::arg("step"), py::arg("stream") = 0, without_gil,
          "Make a step's pages ready for later work of the stream.")
      .def(
          "end",
          [](Streamer& streamer, StepId step, std::uintptr_t stream) {
            streamer.end(step, stream_of(stream));
          },
          py::arg("step"), py::arg("stream") = 0, without_gil,
          "Let go of a step's pages once the stream's work so far has run.")
      .def("prefetch", &Streamer::prefetch, without_gil, "Load ahead as far as there is room.")
      .def("set_capturing", &Streamer::set_capturing, py::arg("capturing"), without_gil)
      .def("set_trace", &Streamer::set_trace, py::arg("trace"), without_gil,
           "Take times of every step and load, or of stalls only.")
      .def("stats", &Streamer::stats, without_gil)
      .def("passes", &Streamer::passes, without_gil,
           "Return figures of the passes that ended last.")
      .def("timeline", &Streamer::timeline, without_gil, "Return what was traced.")
      .def("step_seconds", &Streamer::step_seconds, without_gil,
           "Return seconds of compute by place of the order, as the last traced pass took.");
}

}  // namespace penstock
