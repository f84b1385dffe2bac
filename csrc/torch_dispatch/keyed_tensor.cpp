#include "torch_dispatch/keyed_tensor.hpp"

#include <ATen/ops/clone.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace penstock::torch_dispatch {

namespace {

at::Tensor alias_of(const at::Tensor& tensor, bool with_key) {
  TORCH_CHECK_VALUE(tensor.defined(), "an undefined tensor cannot be paged");
  const c10::TensorImpl* from = tensor.unsafeGetTensorImpl();
  const c10::DispatchKeySet had = from->key_set();
  const bool ordinary = had.has(c10::DispatchKey::Dense) && from->layout() == c10::kStrided &&
                        !had.has_any(c10::DispatchKeySet(
                            {c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                             c10::DispatchKey::FuncTorchGradWrapper,
                             c10::DispatchKey::Functionalize, c10::DispatchKey::ZeroTensor}));
  TORCH_CHECK_VALUE(ordinary && from->has_storage(),
                    "only ordinary strided tensors can be paged, not one with the keys ", had);
  c10::DispatchKeySet keys(
      c10::toRuntimePerBackendFunctionalityKey(c10::DispatchKey::Dense, had.highestBackendKey()));
  for (const auto bit : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative}) {
    if (had.has(bit)) keys = keys.add(bit);
  }
  if (with_key) keys = keys.add(kKey);
  const c10::InferenceMode normal(false);  // else the new tensor would be an inference tensor
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(from->unsafe_storage()), keys,
                                                       from->dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(from->sizes(), from->strides(),
                                                    from->storage_offset());
  return made;
}

}  // namespace

at::Tensor key(const at::Tensor& plain) {
  return alias_of(plain, true);
}

at::Tensor plain_alias(const at::Tensor& tensor) {
  return alias_of(tensor, false);
}

at::Tensor readable(const at::Tensor& tensor) {
  c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  if (!is_keyed(tensor) || !keys.excluded_.has(kKey)) return tensor;
  keys.excluded_ = keys.excluded_.remove(kKey);
  const c10::impl::ForceDispatchKeyGuard seen(keys);
  return at::clone(tensor);
}

void take_memory(const at::Tensor& tensor, const at::Tensor& values) {
  c10::StorageImpl* to = tensor.storage().unsafeGetStorageImpl();
  c10::StorageImpl* from = values.storage().unsafeGetStorageImpl();
  TORCH_CHECK_VALUE(to != from && to->nbytes() == from->nbytes() && to->device() == from->device(),
                    "a storage of ", to->nbytes(), " bytes on ", to->device(),
                    " cannot take over the memory of one of ", from->nbytes(), " bytes on ",
                    from->device());
  to->set_data_ptr(from->set_data_ptr(at::DataPtr(nullptr, from->device())));
}

}  // namespace penstock::torch_dispatch
