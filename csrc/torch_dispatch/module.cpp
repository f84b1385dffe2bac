// The Python module of this room: a few functions on tensors, and `install`.
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "paging/paging_api.hpp"
#include "torch_dispatch/addresses.hpp"
#include "torch_dispatch/fallback.hpp"
#include "torch_dispatch/held_ranges.hpp"
#include "torch_dispatch/keyed_tensor.hpp"
#include "torch_dispatch/ranges.hpp"

namespace penstock::torch_dispatch {

namespace {

const at::Tensor& tensor_of(PyObject* object) {
  TORCH_CHECK_TYPE(THPVariable_Check(object), "expected a tensor, not ", Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

PyObject* py_install(PyObject*, PyObject* capsule) {
  HANDLE_TH_ERRORS
  const auto* api =
      static_cast<const PagingApi*>(PyCapsule_GetPointer(capsule, PagingApi::kCapsule));
  if (api == nullptr) return nullptr;
  TORCH_CHECK_VALUE(api->version == PagingApi::kVersion, "the core offers version ", api->version,
                    " of the paging functions; this library needs version ", PagingApi::kVersion,
                    ": reinstall penstock");
  Py_INCREF(capsule);  // for good: operations may be under way
  install(api);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_key(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(key(tensor_of(object)));
  END_HANDLE_TH_ERRORS
}

PyObject* py_is_keyed(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(THPVariable_Check(object) && is_keyed(THPVariable_Unpack(object)) ? 1 : 0);
  END_HANDLE_TH_ERRORS
}

PyObject* py_readable(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(readable(tensor_of(object)));
  END_HANDLE_TH_ERRORS
}

PyObject* py_plain(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(plain_alias(tensor_of(object)));
  END_HANDLE_TH_ERRORS
}

PyObject* py_take_memory(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* tensor = nullptr;
  PyObject* values = nullptr;
  if (PyArg_ParseTuple(arguments, "OO", &tensor, &values) == 0) return nullptr;
  take_memory(tensor_of(tensor), tensor_of(values));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_hold_address(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* tensor = nullptr;
  unsigned long long scope = 0;
  int patient = 0;
  if (PyArg_ParseTuple(arguments, "OKp", &tensor, &scope, &patient) == 0) return nullptr;
  hold_address(tensor_of(tensor), scope, patient != 0);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* py_address_function(PyObject*, PyObject*) {
  return PyLong_FromVoidPtr(reinterpret_cast<void*>(&address_for_kernel));
}

PyObject* py_storage_range(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  const at::Tensor& tensor = tensor_of(object);
  const bool strided = tensor.defined() && tensor.layout() == c10::kStrided;
  const auto range = strided ? range_of(tensor, false) : std::nullopt;
  if (!range) Py_RETURN_NONE;
  return Py_BuildValue(
      "(KK)", static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(range->address)),
      static_cast<unsigned long long>(range->nbytes));
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"install", py_install, METH_O, "Use the functions of a capsule of the core."},
    {"key", py_key, METH_O, "Return a keyed tensor over the same storage."},
    {"is_keyed", py_is_keyed, METH_O, "Return whether this is a keyed tensor."},
    {"readable", py_readable, METH_O, "Return it, or a copy where its key is taken out of calls."},
    {"plain", py_plain, METH_O, "Return a tensor without the key over the same storage."},
    {"take_memory", py_take_memory, METH_VARARGS, "Move the memory of one storage to another."},
    {"hold_address", py_hold_address, METH_VARARGS, "Hold a tensor for who takes its address."},
    {"address_function", py_address_function, METH_NOARGS, "Return address_for_kernel's address."},
    {"storage_range", py_storage_range, METH_O, "Return address and length of a view, or None."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "penstock_torch_dispatch",
                          "Sees operations on paged tensors where torch dispatches them.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

}  // namespace penstock::torch_dispatch

PyMODINIT_FUNC PyInit_penstock_torch_dispatch() {
  HANDLE_TH_ERRORS
  penstock::torch_dispatch::register_fallback();
  return PyModule_Create(&penstock::torch_dispatch::definition);
  END_HANDLE_TH_ERRORS
}
