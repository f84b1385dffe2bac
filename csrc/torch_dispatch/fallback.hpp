// The fallback that torch's dispatcher calls for every operation that is given a keyed tensor.
#pragma once

namespace penstock::torch_dispatch {

/// Registers it, once in a process. @throws c10::Error if another library has the key.
void register_fallback();

}  // namespace penstock::torch_dispatch
