#include "torch_dispatch/ordinary.hpp"

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace penstock::torch_dispatch {

bool thread_is_ordinary() {
  static constexpr c10::DispatchKeySet kModes(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
       c10::DispatchKey::PythonDispatcher, c10::DispatchKey::PreDispatch,
       c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchVmapMode,
       c10::DispatchKey::FuncTorchDynamicLayerBackMode,
       c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::Tracer});
  return !c10::impl::tls_local_dispatch_key_set().included_.has_any(kModes);
}

bool is_ordinary(const at::Tensor& tensor) {
  static constexpr c10::DispatchKeySet kOdd(
      {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
       c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  if (!tensor.defined()) return false;
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return impl->key_set().has(c10::DispatchKey::Dense) && impl->layout() == c10::kStrided &&
         !impl->key_set().has_any(kOdd);
}

bool is_uniform(c10::ArrayRef<c10::ArrayRef<c10::IValue>> lists) {
  if (lists.empty() || lists[0].empty()) return true;
  const auto& first = lists[0][0].toTensor();
  for (const auto& list : lists) {
    for (std::size_t at = 0; at < list.size(); ++at) {
      const auto& tensor = list[at].toTensor();
      const auto& model = lists[0][at].toTensor();
      if (tensor.scalar_type() != first.scalar_type() || tensor.device() != first.device() ||
          tensor.sizes() != model.sizes() || tensor.strides() != model.strides() ||
          !tensor.unsafeGetTensorImpl()->is_non_overlapping_and_dense()) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace penstock::torch_dispatch
