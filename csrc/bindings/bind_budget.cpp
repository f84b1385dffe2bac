#include <pybind11/chrono.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bindings/bindings.hpp"
#include "budget/budget.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

std::map<std::string, std::size_t> by_name(const std::array<std::size_t, kTagCount>& figures) {
  std::map<std::string, std::size_t> named;
  for (std::size_t i = 0; i < kTagCount; ++i) {
    named[tag_name(static_cast<Tag>(i))] = figures[i];
  }
  return named;
}

}  // namespace

void bind_budget(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::native_enum<Tag>(module, "Tag", "enum.Enum", "What charged bytes are used for.")
      .value("weights", Tag::kWeights)
      .value("activations", Tag::kActivations)
      .value("workspace", Tag::kWorkspace)
      .value("cache", Tag::kCache)
      .value("outside", Tag::kOutside)
      .finalize();

  py::class_<BudgetStats>(module, "BudgetStats", "One consistent reading of the ledger, in bytes.")
      .def_readonly("cap", &BudgetStats::cap)
      .def_readonly("used", &BudgetStats::used)
      .def_readonly("peak", &BudgetStats::peak)
      .def_readonly("refused", &BudgetStats::refused)
      .def_property_readonly("used_by_tag",
                             [](const BudgetStats& stats) { return by_name(stats.used_by_tag); })
      .def_property_readonly("peak_by_tag",
                             [](const BudgetStats& stats) { return by_name(stats.peak_by_tag); });

  py::class_<Budget, std::shared_ptr<Budget>>(
      module, "Budget", "The ledger that hands the cap out, tag by tag. Thread-safe.")
      .def(py::init<std::size_t>(), py::arg("cap"))
      .def("try_charge", &Budget::try_charge, py::arg("tag"), py::arg("nbytes"),
           "Charge bytes if they fit; return whether they did.")
      .def("charge_within", &Budget::charge_within, py::arg("tag"), py::arg("nbytes"),
           py::arg("limit"), without_gil,
           "Charge bytes, waiting for room up to a time limit; return whether they were charged.")
      .def("charge", &Budget::charge, py::arg("tag"), py::arg("nbytes"),
           "Charge bytes, or raise CapExceededError.")
      .def("release", &Budget::release, py::arg("tag"), py::arg("nbytes"),
           "Give charged bytes back.")
      .def("try_set_cap", &Budget::try_set_cap, py::arg("cap"),
           "Change the cap unless more is in use; return whether it changed.")
      .def_property_readonly("cap", &Budget::cap)
      .def_property_readonly("available", &Budget::available)
      .def("stats", &Budget::stats, "Read the ledger.")
      .def("reset_peaks", &Budget::reset_peaks, "Let peaks start again from what is in use.");
}

}  // namespace penstock
