#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>

#include "bindings/bindings.hpp"
#include "planner/planner.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

using Steps = std::vector<std::vector<PageIndex>>;

PlanRequest request_of(std::size_t page_count, std::size_t page_size, Steps steps,
                       std::size_t frames, double link_rate, std::vector<double> step_seconds,
                       std::vector<PageIndex> keep, std::vector<PageIndex> stream,
                       std::size_t least_ring) {
  return {page_count,      page_size, std::move(steps), std::move(step_seconds),
          std::move(keep), frames,    link_rate,        std::move(stream),
          least_ring};
}

std::vector<std::optional<SlotIndex>> slots_of(const Plan& plan) {
  std::vector<std::optional<SlotIndex>> slots;
  slots.reserve(plan.slot.size());
  for (const SlotIndex slot : plan.slot) {
    slots.push_back(slot == kResident ? std::nullopt : std::optional(slot));
  }
  return slots;
}

std::vector<std::tuple<PageIndex, StepIndex>> loads_of(const Plan& plan) {
  std::vector<std::tuple<PageIndex, StepIndex>> loads;
  loads.reserve(plan.loads.size());
  for (const Load& load : plan.loads) loads.emplace_back(load.page, load.step);
  return loads;
}

}  // namespace

void bind_planner(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<Plan>(module, "Plan", "Which pages stay, and how the others stream.")
      .def_readonly("resident", &Plan::resident)
      .def_readonly("ring", &Plan::ring)
      .def_property_readonly("slot", &slots_of,
                             "By page: its frame of the ring, None for a resident page.")
      .def_property_readonly("loads", &loads_of, "Pairs of page and step, in order.")
      .def_readonly("bytes_per_pass", &Plan::bytes_per_pass)
      .def_readonly("seconds", &Plan::seconds)
      .def_property_readonly("frames", &Plan::frames);

  module.def(
      "plan",
      [](std::size_t page_count, std::size_t page_size, Steps steps, std::size_t frames,
         double link_rate, std::vector<double> step_seconds, std::vector<PageIndex> keep,
         std::vector<PageIndex> stream, std::size_t least_ring) {
        return make_plan(request_of(page_count, page_size, std::move(steps), frames, link_rate,
                                    std::move(step_seconds), std::move(keep), std::move(stream),
                                    least_ring));
      },
      py::arg("page_count"), py::arg("page_size"), py::arg("steps"), py::arg("frames"),
      py::arg("link_rate"), py::arg("step_seconds") = std::vector<double>(),
      py::arg("keep") = std::vector<PageIndex>(), py::arg("stream") = std::vector<PageIndex>(),
      py::arg("least_ring") = 0, without_gil,
      "Plan a pass: the steps' pages, on so many frames, over a link of so many bytes a second.");

  module.def(
      "least_frames",
      [](std::size_t page_count, Steps steps, std::vector<PageIndex> keep) {
        return least_frames(
            request_of(page_count, 1, std::move(steps), 0, 1, {}, std::move(keep), {}, 0));
      },
      py::arg("page_count"), py::arg("steps"), py::arg("keep") = std::vector<PageIndex>(),
      without_gil, "Return the fewest frames with which the steps can run.");
}

}  // namespace penstock
