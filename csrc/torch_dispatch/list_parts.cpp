#include "torch_dispatch/list_parts.hpp"

#include "torch_dispatch/ordinary.hpp"

namespace penstock::torch_dispatch {

void Runs::count(c10::ArrayRef<c10::IValue> list) {
  for (std::size_t at = 0; at < list.size(); ++at) {
    if (!list[at].isTensor() || !is_keyed(list[at].toTensor())) continue;
    if (const auto range = range_of(list[at].toTensor(), false)) bytes_[at] += range->nbytes;
  }
}

std::size_t Runs::end_of(std::size_t begin) const {
  std::size_t total = bytes_[begin];
  std::size_t end = begin + 1;
  while (end < bytes_.size() && bytes_[end] <= limit_ && total <= limit_ - bytes_[end]) {
    total += bytes_[end++];
  }
  return end;
}

c10::IValue cut(const c10::IValue& list, std::size_t begin, std::size_t end) {
  const auto elements = list.toListRef();
  c10::impl::GenericList part(list.toList().elementType());
  part.reserve(end - begin);
  for (std::size_t at = begin; at < end; ++at) part.push_back(elements[at]);
  return part;
}

bool run_in_parts(const Operation& operation, const Uses& uses, torch::jit::Stack* stack) {
  const Parts parts = operation.signature.parts;
  if (parts == Parts::kNone || uses.ranges.size() < 2) return false;
  const std::size_t limit = operation.api.part_bytes(uses.ranges.data(), uses.ranges.size());
  if (limit >= total_bytes(uses.ranges) || !thread_is_ordinary()) return false;
  return parts == Parts::kElements ? run_by_elements(operation, limit, stack)
                                   : run_by_joining(operation, limit, stack);
}

}  // namespace penstock::torch_dispatch
