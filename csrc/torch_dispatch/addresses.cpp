#include "torch_dispatch/addresses.hpp"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>

#include "torch_dispatch/held_ranges.hpp"
#include "torch_dispatch/keyed_tensor.hpp"
#include "torch_dispatch/operation.hpp"
#include "torch_dispatch/ranges.hpp"

namespace penstock::torch_dispatch {

namespace {

constexpr const char* kName = "a kernel that takes addresses";
constexpr int kNoBackward = -1;

// A thread of autograd's may have no further step for long: it lets go when the pass has ended.
void release_after_backward(const PagingApi& api, int backward, std::uint64_t thread) {
  thread_local int asked = kNoBackward;
  if (backward == kNoBackward || backward == asked) return;
  torch::autograd::Engine::get_default_engine().queue_callback(
      [&api, thread] { call_core([&](void** error) { api.release_addresses(thread, error); }); });
  asked = backward;
}

}  // namespace

void hold_address(const at::Tensor& tensor, std::uint64_t scope, bool patient) {
  const PagingApi* api = paging_api();
  if (api == nullptr || !tensor.defined() || !is_keyed(tensor)) return;
  const auto range = range_of(tensor, false);
  if (!range) return;
  const int backward = torch::autograd::get_current_graph_task_id();
  const PagingOperation operation{kName, kName, stream_of(tensor.device()),
                                  backward != kNoBackward};
  std::uint64_t thread = 0;
  call_core([&](void** error) {
    thread = api->hold_address(&operation, &range.value(), scope, patient, error);
  });
  if (thread != 0) release_after_backward(*api, backward, thread);
}

void* address_for_kernel(PyObject* object) {
  if (object == nullptr || !THPVariable_Check(object)) {
    throw std::runtime_error("a kernel was given something else than a tensor");
  }
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (!is_keyed(tensor)) return tensor.data_ptr();
  PyObject* address = PyObject_CallMethod(object, "data_ptr", nullptr);
  if (address == nullptr) throw std::runtime_error("a weight could not be brought in");
  void* found = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return found;
}

}  // namespace penstock::torch_dispatch
