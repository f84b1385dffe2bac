#include <pybind11/chrono.h>

#include <chrono>
#include <memory>
#include <utility>

#include "bindings/bindings.hpp"
#include "outside/outside_watch.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

// Let go of without the GIL, since it waits for its thread when it goes.
std::shared_ptr<OutsideWatch> make_watch(std::shared_ptr<FramePool> pool, std::size_t reserve,
                                         std::chrono::milliseconds interval) {
  const py::gil_scoped_release without_gil;
  return {new OutsideWatch(std::move(pool), {reserve, interval}), [](OutsideWatch* watch) {
            if (PyGILState_Check() == 0) {
              delete watch;
              return;
            }
            const py::gil_scoped_release released;
            delete watch;
          }};
}

}  // namespace

void bind_outside(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<OutsideStats>(module, "OutsideStats",
                           "What the process holds beyond the ledger, in bytes.")
      .def_readonly("held", &OutsideStats::held)
      .def_readonly("reserve", &OutsideStats::reserve)
      .def_readonly("charged", &OutsideStats::charged)
      .def_readonly("whole_device", &OutsideStats::whole_device)
      .def_readonly("looks", &OutsideStats::looks)
      .def_readonly("discarded", &OutsideStats::discarded);

  py::class_<OutsideWatch, std::shared_ptr<OutsideWatch>>(
      module, "OutsideWatch",
      "Charges the cap for what the process holds beyond the ledger. Thread-safe.")
      .def(py::init(&make_watch), py::arg("pool"), py::arg("reserve"),
           py::arg("interval") = OutsideOptions{}.interval)
      .def("look", &OutsideWatch::look, py::arg("limit"), without_gil,
           "Wait until it has looked, from now on, and charged; return whether it has in time.")
      .def("stop", &OutsideWatch::stop, without_gil, "Look no more; what is charged stays so.")
      .def("set_reserve", &OutsideWatch::set_reserve, py::arg("nbytes"),
           "Change the reserve, from the next look on.")
      .def("stats", &OutsideWatch::stats, "Read the figures.");
}

}  // namespace penstock
