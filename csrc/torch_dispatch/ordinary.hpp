// Whether tensors and the thread are in a state in which an operation may be replaced by several
// that do the same: nobody traces, transforms or counts operations, and the tensors hold their
// values themselves.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

namespace penstock::torch_dispatch {

/// Whether no mode looks at the operations of this thread.
bool thread_is_ordinary();

/// Whether the tensor is defined, strided, and no wrapper, lazy conjugate or negative, or subclass
/// that handles operations.
bool is_ordinary(const at::Tensor& tensor);

/// Whether torch takes the same kernel for each part of these lists as for the whole: it has a fast
/// one for lists whose tensors are all of one dtype and device, dense, and laid out like those at
/// the same places of the other lists.
/// @param lists  Of the same length, of ordinary tensors.
bool is_uniform(c10::ArrayRef<c10::ArrayRef<c10::IValue>> lists);

}  // namespace penstock::torch_dispatch
