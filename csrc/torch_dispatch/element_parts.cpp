#include <ATen/core/List.h>
#include <ATen/ops/narrow.h>

#include <utility>
#include <vector>

#include "torch_dispatch/list_parts.hpp"
#include "torch_dispatch/ordinary.hpp"

namespace penstock::torch_dispatch {

namespace {

// How an argument goes to the parts.
enum class Share : std::uint8_t { kWhole, kElements, kSlice };

struct Plan {
  std::vector<Share> shares;  // by argument
  std::size_t length = 0;
};

bool is_list_of_tensors(const c10::IValue& value) {
  return value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensor();
}

// Foreach operators on CUDA have a fast kernel for uniform lists only, which may round differently.
bool one_kernel(const Operation& operation, c10::ArrayRef<c10::ArrayRef<c10::IValue>> lists) {
  const bool foreach = operation.signature.name.starts_with("aten::_foreach_");
  return !foreach || lists[0][0].toTensor().is_cpu() || is_uniform(lists);
}

std::optional<Plan> plan_of(const Operation& operation, c10::ArrayRef<c10::IValue> arguments) {
  Plan plan{std::vector<Share>(arguments.size(), Share::kWhole)};
  c10::SmallVector<c10::ArrayRef<c10::IValue>, 8> lists;
  for (const auto& argument : arguments) {
    if (!is_list_of_tensors(argument)) continue;
    const auto list = argument.toListRef();
    if (plan.length == 0) plan.length = list.size();
    if (list.size() != plan.length) return std::nullopt;
    for (const auto& element : list) {
      if (!element.isTensor() || !is_ordinary(element.toTensor())) return std::nullopt;
    }
    lists.push_back(list);
  }
  if (plan.length < 2 || !one_kernel(operation, lists)) return std::nullopt;
  const auto& schema = operation.op.schema().arguments();
  const auto length = static_cast<std::int64_t>(plan.length);
  for (std::size_t at = 0; at < arguments.size(); ++at) {
    const auto& argument = arguments[at];
    if (argument.isList() && argument.toListRef().size() == plan.length) {
      plan.shares[at] = Share::kElements;
    } else if (argument.isList() && !argument.toListRef().empty()) {
      return std::nullopt;
    } else if (argument.isTensor() && schema[at].name() == "scalars") {
      const auto& scalars = argument.toTensor();
      if (!is_ordinary(scalars) || scalars.dim() != 1 || scalars.size(0) != length) {
        return std::nullopt;
      }
      plan.shares[at] = Share::kSlice;
    }
  }
  return plan;
}

torch::jit::Stack part_of(const Plan& plan, c10::ArrayRef<c10::IValue> arguments, std::size_t begin,
                          std::size_t end) {
  torch::jit::Stack part;
  part.reserve(arguments.size());
  for (std::size_t at = 0; at < arguments.size(); ++at) {
    if (plan.shares[at] == Share::kElements) {
      part.push_back(cut(arguments[at], begin, end));
    } else if (plan.shares[at] == Share::kSlice) {
      part.emplace_back(at::narrow(arguments[at].toTensor(), 0, static_cast<std::int64_t>(begin),
                                   static_cast<std::int64_t>(end - begin)));
    } else {
      part.push_back(arguments[at]);
    }
  }
  return part;
}

}  // namespace

bool run_by_elements(const Operation& operation, std::size_t limit, torch::jit::Stack* stack) {
  const auto& signature = operation.signature;
  const auto arguments = torch::jit::last(*stack, signature.count);
  const auto plan = plan_of(operation, arguments);
  if (!plan) return false;
  Runs runs(plan->length, limit);
  for (const auto& argument : signature.arguments) {
    const auto& value = arguments[argument.index];
    if (plan->shares[argument.index] == Share::kElements) runs.count(value.toListRef());
  }
  if (runs.end_of(0) == plan->length) return false;
  std::vector<c10::List<at::Tensor>> results(operation.op.schema().returns().size());
  for (std::size_t begin = 0; begin < plan->length;) {
    const std::size_t end = runs.end_of(begin);
    auto part = part_of(*plan, arguments, begin, end);
    const Uses uses = uses_of(signature, part);
    operation.run_holding(uses.ranges, uses.device, &part);
    for (std::size_t at = 0; at < results.size(); ++at) {
      results[at].append(std::move(part[at]).toTensorList());
    }
    begin = end;
  }
  torch::jit::drop(*stack, signature.count);
  for (auto& result : results) stack->emplace_back(std::move(result));
  return true;
}

}  // namespace penstock::torch_dispatch
