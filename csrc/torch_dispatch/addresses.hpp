// Addresses of keyed tensors, for kernels that read them past the dispatcher: Triton's, those that
// inductor makes, ctypes. What they point to is held as PagingApi::hold_address says; what is taken
// in a backward pass goes with it at the latest.
#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <cstdint>

namespace penstock::torch_dispatch {

/// Has the bytes of a keyed tensor in place for who takes its address; leaves others alone.
/// @param scope, patient  See PagingApi. @throws python_error with the core's exception.
void hold_address(const at::Tensor& tensor, std::uint64_t scope, bool patient);

/// Stands in for the function by which kernels that inductor makes for the host take addresses: of
/// keyed tensors, it asks their `data_ptr` method. @throws std::runtime_error; Python's error is
/// set then.
void* address_for_kernel(PyObject* object);

}  // namespace penstock::torch_dispatch
