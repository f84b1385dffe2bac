// One call of an operator that came to the fallback, and how to go on with it below the key.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>

#include "torch_dispatch/keyed_tensor.hpp"
#include "torch_dispatch/ranges.hpp"
#include "torch_dispatch/signature.hpp"

namespace penstock::torch_dispatch {

struct Operation {
  const c10::OperatorHandle& op;
  c10::DispatchKeySet keys;
  const Signature& signature;
  const PagingApi& api;

  /// Runs it on the arguments on top of the stack, which its results replace. The key stays on for
  /// the thread, so that operations inside it come to the fallback too.
  void go_on(torch::jit::Stack* stack) const { op.redispatchBoxed(below_key(keys), stack); }

  /// Runs it with these ranges held.
  void run_holding(const Ranges& ranges, const std::optional<c10::Device>& device,
                   torch::jit::Stack* stack) const;
};

/// What an operation reads and writes of keyed tensors.
struct Uses {
  Ranges ranges;
  std::optional<c10::Device> device;  ///< Of the first that is not on the host.
};

/// The current stream of a device, as a cudaStream_t; null for the host's, and for none.
void* stream_of(const std::optional<c10::Device>& device);

/// Adds what is used of a tensor, if it has the key.
void use(const at::Tensor& tensor, bool written, Uses& uses);

/// What the core is told of an operation that runs in this thread now.
PagingOperation paging_operation(const Signature& signature,
                                 const std::optional<c10::Device>& device);

/// Looks at the arguments on top of the stack.
Uses uses_of(const Signature& signature, const torch::jit::Stack& stack);

}  // namespace penstock::torch_dispatch
