// The bytes that a view of a storage spans: from its first element to the end of its last one. Gaps
// between rows of a view are within the range. A view with a conjugate or negative bit spans the
// same bytes as one without.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstddef>
#include <optional>

#include "paging/paging_api.hpp"

namespace penstock::torch_dispatch {

/// Ranges of one operation; most operations have no more than these, and need no allocation then.
using Ranges = c10::SmallVector<PagingRange, 8>;

/// Returns the bytes of a defined, strided tensor. Nothing for a tensor without elements or memory.
/// Does not change the storage, whatever it is: a lazy copy stays lazy.
std::optional<PagingRange> range_of(const at::Tensor& tensor, bool written);

/// Returns the sum of the sizes of the ranges.
std::size_t total_bytes(const Ranges& ranges);

}  // namespace penstock::torch_dispatch
