// Kernels of the key for the operators that read weights most often. They do what the fallback
// does, without the stack of boxed arguments that it needs, which costs as much again.
#pragma once

#include <torch/library.h>

namespace penstock::torch_dispatch {

/// Registers them in a library for "aten" and the key.
void register_frequent(torch::Library& aten);

}  // namespace penstock::torch_dispatch
