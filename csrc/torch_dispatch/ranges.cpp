#include "torch_dispatch/ranges.hpp"

#include <cstdint>

namespace penstock::torch_dispatch {

std::optional<PagingRange> range_of(const at::Tensor& tensor, bool written) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!impl->has_storage()) return std::nullopt;
  // The accessors of the storage may copy it or throw; this one only reads the address.
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const auto* base = static_cast<const std::byte*>(storage->_mutable_data_ptr_no_checks().get());
  if (base == nullptr) return std::nullopt;
  const auto sizes = impl->sizes();
  const auto strides = impl->strides();
  std::int64_t last = 0;
  for (std::size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return std::nullopt;
    last += (sizes[dim] - 1) * strides[dim];
  }
  const std::size_t item = impl->itemsize();
  const auto offset = static_cast<std::size_t>(impl->storage_offset()) * item;
  return PagingRange{base + offset, (static_cast<std::size_t>(last) + 1) * item, written};
}

std::size_t total_bytes(const Ranges& ranges) {
  std::size_t total = 0;
  for (const auto& range : ranges) total += range.nbytes;
  return total;
}

}  // namespace penstock::torch_dispatch
