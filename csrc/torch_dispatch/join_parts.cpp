#include <ATen/core/List.h>
#include <ATen/ops/cat.h>

#include <utility>

#include "torch_dispatch/list_parts.hpp"
#include "torch_dispatch/ordinary.hpp"

namespace penstock::torch_dispatch {

namespace {

// Whether the result of joining parts first has the dtype, layout and bits of the whole. Tensors
// of one dimension and no elements are left out here, since `cat` skips them whatever its `dim`.
bool can_join(c10::ArrayRef<c10::IValue> list) {
  for (const auto& element : list) {
    if (!element.isTensor() || !is_ordinary(element.toTensor())) return false;
    const auto& tensor = element.toTensor();
    const auto& first = list[0].toTensor();
    if (tensor.scalar_type() != first.scalar_type() || tensor.device() != first.device() ||
        tensor.dim() != first.dim() || (tensor.dim() == 1 && tensor.numel() == 0) ||
        tensor.suggest_memory_format() != first.suggest_memory_format()) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool run_by_joining(const Operation& operation, std::size_t limit, torch::jit::Stack* stack) {
  const auto& signature = operation.signature;
  const auto arguments = torch::jit::last(*stack, signature.count);
  if (arguments.size() != 2 || !arguments[0].isList() || !arguments[1].isInt()) return false;
  const auto list = arguments[0].toListRef();
  if (list.size() < 2 || !can_join(list)) return false;
  Runs runs(list.size(), limit);
  runs.count(list);
  if (runs.end_of(0) == list.size()) return false;
  std::vector<std::size_t> begins;
  for (std::size_t at = 0; at < list.size(); at = runs.end_of(at)) begins.push_back(at);
  // Autograd goes back through what was made last first: so that gradients of a tensor that is in
  // several parts are added in the order of the whole, the first part is made last.
  std::vector<at::Tensor> joined(begins.size());
  for (std::size_t at = begins.size(); at-- > 0;) {
    torch::jit::Stack part{cut(arguments[0], begins[at], runs.end_of(begins[at])), arguments[1]};
    const Uses uses = uses_of(signature, part);
    operation.run_holding(uses.ranges, uses.device, &part);
    joined[at] = std::move(part[0]).toTensor();
  }
  auto result = at::cat(joined, arguments[1].toInt());  // what was stacked has that dimension now
  torch::jit::drop(*stack, signature.count);
  stack->emplace_back(std::move(result));
  return true;
}

}  // namespace penstock::torch_dispatch
