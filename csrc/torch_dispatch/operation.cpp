#include "torch_dispatch/operation.hpp"

#include "torch_dispatch/held_ranges.hpp"

#ifdef PENSTOCK_TORCH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace torch::autograd {
TORCH_API int get_current_graph_task_id();  // in a header that includes all of autograd's graph
}

namespace penstock::torch_dispatch {

void* stream_of(const std::optional<c10::Device>& device) {
#ifdef PENSTOCK_TORCH_CUDA
  if (device && device->is_cuda()) {
    return c10::cuda::getCurrentCUDAStream(device->index()).stream();
  }
#else
  static_cast<void>(device);
#endif
  return nullptr;
}

namespace {

void use_list(c10::ArrayRef<c10::IValue> list, bool written, Uses& uses) {
  for (const auto& element : list) {
    if (element.isTensor()) {
      use(element.toTensor(), written, uses);
    } else if (element.isList()) {
      use_list(element.toListRef(), written, uses);
    }
  }
}

}  // namespace

void use(const at::Tensor& tensor, bool written, Uses& uses) {
  if (!is_keyed(tensor)) return;
  if (const auto range = range_of(tensor, written)) uses.ranges.push_back(*range);
  if (!uses.device && !tensor.is_cpu()) uses.device = tensor.device();
}

PagingOperation paging_operation(const Signature& signature,
                                 const std::optional<c10::Device>& device) {
  return {&signature, signature.name.c_str(), stream_of(device),
          torch::autograd::get_current_graph_task_id() != -1};
}

Uses uses_of(const Signature& signature, const torch::jit::Stack& stack) {
  Uses uses;
  const auto arguments = torch::jit::last(stack, signature.count);
  for (const auto& argument : signature.arguments) {
    const auto& value = arguments[argument.index];
    const bool tensor = value.isTensor();
    if (!tensor && !value.isList()) continue;
    bool written = argument.access == Access::kWrite;
    if (argument.access == Access::kWriteInTraining) {
      const auto& training = arguments[static_cast<std::size_t>(signature.training)];
      written = training.isBool() && training.toBool();
    }
    if (tensor) {
      use(value.toTensor(), written, uses);
    } else {
      use_list(value.toListRef(), written, uses);
    }
  }
  return uses;
}

void Operation::run_holding(const Ranges& ranges, const std::optional<c10::Device>& device,
                            torch::jit::Stack* stack) const {
  HeldRanges held(api, paging_operation(signature, device), ranges);
  go_on(stack);
  held.release();
}

}  // namespace penstock::torch_dispatch
