#include "torch_dispatch/held_ranges.hpp"

#include <Python.h>
#include <torch/csrc/Exceptions.h>

#include <atomic>
#include <utility>

namespace penstock::torch_dispatch {

namespace {

std::atomic<const PagingApi*> installed{nullptr};

bool python_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0 || Py_IsInitialized() == 0;
#else
  return _Py_IsFinalizing() != 0 || Py_IsInitialized() == 0;
#endif
}

// While it lives, this thread does not have the global lock.
class WithoutGil {
 public:
  WithoutGil() : state_(PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr) {}
  ~WithoutGil() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// While it lives, whatever error was set in this thread is set aside, with or without the lock:
// torch throws C++ exceptions that stand for the Python error that is set.
class ErrorAside {
 public:
  ErrorAside() {
    const auto state = PyGILState_Ensure();
    PyErr_Fetch(&type_, &value_, &traceback_);
    PyGILState_Release(state);
  }
  ~ErrorAside() {
    const auto state = PyGILState_Ensure();
    PyErr_Restore(type_, value_, traceback_);
    PyGILState_Release(state);
  }
  ErrorAside(const ErrorAside&) = delete;
  ErrorAside& operator=(const ErrorAside&) = delete;

 private:
  PyObject* type_ = nullptr;
  PyObject* value_ = nullptr;
  PyObject* traceback_ = nullptr;
};

[[noreturn]] void raise(void* object) {
  python_error error;
  {
    const ErrorAside aside;
    const auto state = PyGILState_Ensure();
    auto* value = static_cast<PyObject*>(object);  // our reference, which the error takes
    error.type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    Py_INCREF(error.type);
    error.value = value;
    error.traceback = PyException_GetTraceback(value);
    error.build_message();
    PyGILState_Release(state);
  }
  throw error;
}

}  // namespace

const PagingApi* paging_api() {
  const PagingApi* api = installed.load(std::memory_order_acquire);
  return api != nullptr && !python_is_ending() ? api : nullptr;
}

void install(const PagingApi* api) {
  installed.store(api, std::memory_order_release);
}

void call_core(const std::function<void(void** error)>& function) {
  void* error = nullptr;
  {
    const WithoutGil released;
    function(&error);
  }
  if (error != nullptr) raise(error);
}

HeldRanges::HeldRanges(const PagingApi& api, const PagingOperation& operation, const Ranges& ranges)
    : api_(api) {
  if (api_.begin_at_once(&operation, ranges.data(), ranges.size(), &held_)) return;
  void* error = nullptr;
  {
    const WithoutGil released;
    held_ = api_.begin(&operation, ranges.data(), ranges.size(), &error);
  }
  if (error != nullptr) raise(error);
}

HeldRanges::~HeldRanges() {
  if (held_ == nullptr) return;
  void* error = nullptr;
  const ErrorAside aside;
  end(&error);
  if (error == nullptr) return;
  const auto state = PyGILState_Ensure();
  Py_DECREF(static_cast<PyObject*>(error));
  PyGILState_Release(state);
}

void HeldRanges::release() {
  void* error = nullptr;
  end(&error);
  if (error != nullptr) raise(error);
}

void HeldRanges::end(void** error) {
  if (held_ == nullptr) return;
  if (api_.end_at_once(held_)) {
    held_ = nullptr;
    return;
  }
  const WithoutGil released;
  api_.end(std::exchange(held_, nullptr), error);
}

}  // namespace penstock::torch_dispatch
