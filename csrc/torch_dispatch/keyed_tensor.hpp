// A keyed tensor is an ordinary tensor whose implementation carries one more dispatch key, so that
// torch's dispatcher calls the fallback of this room for each operation that is given it. The key
// is DeferredInit: nothing in torch uses it, and it lies above autograd, autocast and functorch's
// batching.
//
// Torch copies the key to views, to `detach()` and to `.data`; clones and results are plain. A
// keyed tensor shares the storage of the tensor from which it was made, and nothing else: it has no
// gradient, no history and a version counter of its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

namespace penstock::torch_dispatch {

inline constexpr c10::DispatchKey kKey = c10::DispatchKey::DeferredInit;

/// What comes below the key, for going on with an operation there.
inline c10::DispatchKeySet below_key(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey);
}

inline bool is_keyed(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->key_set().has(kKey);  // an undefined tensor has no key
}

/// Returns a keyed tensor over the same storage, with the same sizes, strides, offset and dtype. It
/// is never an inference tensor. @throws c10::Error for a tensor that is not strided, or of a class
/// that handles operations itself.
at::Tensor key(const at::Tensor& plain);

/// Returns a tensor over the same storage that has no key: what is done with it is not seen.
at::Tensor plain_alias(const at::Tensor& tensor);

/// Returns a keyed tensor itself; where the thread excludes the key from what it calls, as torch
/// does where it makes a tensor of numbers, a plain copy.
at::Tensor readable(const at::Tensor& tensor);

/// Has the storage of `tensor` take over the memory of that of `values`, which is left without any:
/// all tensors over it are there from then on. Nothing may use either meanwhile.
/// @throws c10::Error where sizes or devices differ.
void take_memory(const at::Tensor& tensor, const at::Tensor& values);

}  // namespace penstock::torch_dispatch
