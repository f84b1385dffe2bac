// Errors of the core become the classes of the same name in penstock.errors, with their figures.
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <optional>
#include <utility>

#include "bindings/bindings.hpp"
#include "error/error.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

template <typename... Figures>
void raise(const char* class_name, const Error& error, Figures... figures) {
  const py::object type = py::module_::import("penstock.errors").attr(class_name);
  const py::object instance = type(error.what(), std::move(figures)...);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

}  // namespace

void bind_errors(py::module_& /*module*/) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    using py::literals::operator""_a;
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const CapExceededError& error) {
      raise("CapExceededError", error, "requested"_a = error.requested, "cap"_a = error.cap,
            "used"_a = error.used);
    } catch (const DeviceError& error) {
      raise("DeviceError", error, "call"_a = error.call, "code"_a = error.code);
    } catch (const CheckpointError& error) {
      const auto tensor = error.tensor.empty() ? std::nullopt : std::optional(error.tensor);
      raise("CheckpointError", error, "path"_a = std::filesystem::path(error.path),
            "tensor"_a = tensor, "offset"_a = error.offset);
    } catch (const ScheduleError& error) {
      raise("ScheduleError", error);
    } catch (const ModelError& error) {
      raise("ModelError", error);
    } catch (const Error& error) {
      raise("PenstockError", error);
    }
  });
}

}  // namespace penstock
