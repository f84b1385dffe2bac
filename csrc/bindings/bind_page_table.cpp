#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings/bindings.hpp"
#include "managed/page_table.hpp"

namespace py = pybind11;

namespace penstock {

void bind_page_table(py::module_& module) {
  py::native_enum<PageState>(module, "PageState", "enum.Enum", "Where a page is in its life.")
      .value("absent", PageState::kAbsent)
      .value("loading", PageState::kLoading)
      .value("resident", PageState::kResident)
      .value("evicting", PageState::kEvicting)
      .finalize();

  py::class_<PageTable>(module, "PageTable",
                        "States, pins and order of use of one region's pages. Not thread-safe.")
      .def(py::init<std::size_t>(), py::arg("page_count"))
      .def_property_readonly("page_count", &PageTable::page_count)
      .def("state", &PageTable::state, py::arg("page"))
      .def("pins", &PageTable::pins, py::arg("page"))
      .def("count", &PageTable::count, py::arg("state"), "Count the pages in a state.")
      .def("begin_load", &PageTable::begin_load, py::arg("page"))
      .def("finish_load", &PageTable::finish_load, py::arg("page"))
      .def("cancel_load", &PageTable::cancel_load, py::arg("page"))
      .def("begin_evict", &PageTable::begin_evict, py::arg("page"))
      .def("finish_evict", &PageTable::finish_evict, py::arg("page"))
      .def("cancel_evict", &PageTable::cancel_evict, py::arg("page"))
      .def("pin", &PageTable::pin, py::arg("page"))
      .def("unpin", &PageTable::unpin, py::arg("page"))
      .def("touch", &PageTable::touch, py::arg("page"))
      .def("keep", &PageTable::keep, py::arg("pages"),
           "Replace the pages that a plan keeps; the others go before them.")
      .def("kept", &PageTable::kept, py::arg("page"))
      .def("set_schedule", &PageTable::set_schedule, py::arg("steps"))
      .def("advance", &PageTable::advance, py::arg("step"))
      .def_property_readonly("now", &PageTable::now)
      .def(
          "next_use",
          [](const PageTable& table, PageIndex page) {
            const StepTime time = table.next_use(page);
            return time == kNever ? std::nullopt : std::optional(time);
          },
          py::arg("page"), "Return the time of the next use, None for never.")
      .def("victims", &PageTable::victims, py::arg("limit"), py::arg("after") = 0,
           "Return up to `limit` pages to evict, in order, all used later than `after`. Kept ones "
           "are among them where it is 0.");
}

}  // namespace penstock
