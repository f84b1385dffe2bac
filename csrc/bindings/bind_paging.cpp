#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <exception>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "dlpack/capsule.hpp"
#include "paging/address_holds.hpp"
#include "paging/held_operation.hpp"
#include "paging/paged_model.hpp"
#include "paging/paged_models.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

// The exception that is being handled, as an object of Python's.
void* current_exception_object() {
  const py::gil_scoped_acquire gil;
  try {
    py::detail::try_translate_exceptions();
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "unknown error while paging");
  }
  return py::object(py::error_already_set().value()).release().ptr();
}

void* begin(const PagingOperation* operation, const PagingRange* ranges, std::size_t count,
            void** error) {
  try {
    return PagedModels::get().begin(*operation, ranges, count);
  } catch (...) {
    *error = current_exception_object();
    return nullptr;
  }
}

void end(void* held, void** error) {
  try {
    PagedModels::end(static_cast<HeldOperation*>(held));
  } catch (...) {
    *error = current_exception_object();
  }
}

bool begin_at_once(const PagingOperation* operation, const PagingRange* ranges, std::size_t count,
                   void** held) noexcept {
  try {
    HeldOperation* begun = nullptr;
    const bool done = PagedModels::get().begin_at_once(*operation, ranges, count, &begun);
    *held = begun;
    return done;
  } catch (...) {  // beginning it will tell
    return false;
  }
}

bool end_at_once(void* held) noexcept {
  try {
    return PagedModels::end_at_once(static_cast<HeldOperation*>(held));
  } catch (...) {
    return false;
  }
}

std::size_t part_bytes(const PagingRange* ranges, std::size_t count) {
  try {
    return PagedModels::get().part_bytes(ranges, count);
  } catch (...) {  // beginning it will tell
    return std::numeric_limits<std::size_t>::max();
  }
}

std::uint64_t hold_address(const PagingOperation* operation, const PagingRange* range,
                           std::uint64_t scope, bool patient, void** error) {
  try {
    return PagedModels::get().hold_address(*operation, *range, scope, patient);
  } catch (...) {
    *error = current_exception_object();
    return 0;
  }
}

void release_addresses(std::uint64_t thread, void** error) {
  try {
    AddressHolds::release_of(thread);
  } catch (...) {
    *error = current_exception_object();
  }
}

const PagingApi kApi{PagingApi::kVersion, &begin,      &end,          &begin_at_once,
                     &end_at_once,        &part_bytes, &hold_address, &release_addresses};

using Place = std::tuple<std::size_t, std::size_t, std::size_t, std::string>;

std::shared_ptr<PagedModel> make_model(std::string name, std::shared_ptr<Streamer> streamer,
                                       std::shared_ptr<Region> region,
                                       const std::vector<Place>& places) {
  std::vector<TensorPlace> tensors;
  for (const auto& [offset, nbytes, slice, tensor] : places) {
    tensors.push_back({offset, nbytes, slice, tensor});
  }
  auto model = std::make_shared<PagedModel>(std::move(name), std::move(streamer), std::move(region),
                                            std::move(tensors));
  PagedModels::get().add(model);
  return model;
}

}  // namespace

void bind_paging(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  module.def(
      "paging_api",
      [] { return py::capsule(static_cast<const void*>(&kApi), PagingApi::kCapsule); },
      "Return the functions that the library in torch's dispatcher calls.");

  module.def("release_addresses", &PagedModels::release_addresses, without_gil,
             "Let go of what this thread holds for addresses that it has taken.");
  module.def("release_ended_addresses", &PagedModels::release_ended_addresses, py::arg("open"),
             without_gil, "Let go of those whose scope is not open; return whether any were.");

  py::class_<PassEnd>(module, "PassEnd", "How a pass has ended.")
      .def_readonly("first", &PassEnd::first)
      .def_readonly("changed", &PassEnd::changed);

  py::class_<HeldOperation>(module, "Hold", "What is held in place.");
  module.def(
      "let_go", [](HeldOperation* held) { PagedModels::end(held); }, py::arg("held"), without_gil,
      "Let go of what PagedModel.hold returned.");

  py::class_<PagedModel, std::shared_ptr<PagedModel>>(
      module, "PagedModel", "One model's region as the operations of a program see it.")
      .def(py::init(&make_model), py::arg("name"), py::arg("streamer"), py::arg("region"),
           py::arg("tensors"), without_gil,
           "Tensors are (offset, bytes, bytes of a slice, name), ascending by offset.")
      .def(
          "dlpack",
          [](const std::shared_ptr<PagedModel>& model, std::size_t offset, std::size_t nbytes) {
            return to_dlpack(model->region(), offset, nbytes, model);
          },
          py::arg("offset"), py::arg("nbytes"),
          "Return a DLPack capsule over a byte range, which owns the model.")
      .def(
          "begin_call",
          [](PagedModel& model) {
            PagedModels::release_addresses();
            model.begin_call();
          },
          without_gil, "Say that a call of the whole model begins.")
      .def(
          "end_call",
          [](PagedModel& model, std::uintptr_t stream, bool failed, bool complete) {
            PagedModels::release_addresses();
            model.end_call(stream_of(stream), failed, complete);
          },
          py::arg("stream"), py::arg("failed"), py::arg("complete"), without_gil,
          "Say that it has ended, and whether the pass has with it.")
      .def("in_call", &PagedModel::in_call, without_gil)
      .def(
          "hold",
          [](PagedModel& model, const std::string& what,
             const std::vector<std::pair<std::size_t, std::size_t>>& ranges,
             std::uintptr_t stream) {
            return PagedModels::get().begin_kernel(model, what, ranges, stream_of(stream));
          },
          py::arg("what"), py::arg("ranges"), py::arg("stream") = 0,
          py::return_value_policy::reference, without_gil,
          "Have ranges (offset, bytes) in place until let_go in the same thread, as one step; "
          "return what that takes, None where the thread holds all of them already.")
      .def("order", &PagedModel::order, py::arg("first"), without_gil,
           "Return the steps that are expected of passes that begin with one.")
      .def("expected", &PagedModel::expected, without_gil,
           "Return the steps that are expected now.")
      .def("pages", &PagedModel::pages, py::arg("step"), without_gil)
      .def("describe", &PagedModel::describe, py::arg("step"), without_gil)
      .def("tensors", &PagedModel::tensors, py::arg("step"), without_gil,
           "Name the tensors that lie on a step's pages.")
      .def("on_pass", &PagedModel::on_pass, py::arg("handler").none(true), without_gil,
           "Have a function called with a PassEnd whenever a pass has ended.")
      .def("on_next_use", &PagedModel::on_next_use, py::arg("handler").none(true), without_gil,
           "Have a function called once, before the next operation.")
      .def("set_room", &PagedModel::set_room, py::arg("nbytes"),
           "Say how many bytes may be in place at once.")
      .def("set_capturing", &PagedModel::set_capturing, py::arg("capturing"), without_gil);
}

}  // namespace penstock
