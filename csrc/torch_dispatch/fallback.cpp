#include "torch_dispatch/fallback.hpp"

#include <torch/library.h>

#include <string>

#include "torch_dispatch/frequent.hpp"
#include "torch_dispatch/held_ranges.hpp"
#include "torch_dispatch/list_parts.hpp"
#include "torch_dispatch/operation.hpp"

namespace penstock::torch_dispatch {

namespace {

// Sees to it that nothing without the key gets to paged memory.
void take_care(const Signature& signature, torch::jit::Stack* stack) {
  const std::size_t first = stack->size() - signature.count;
  const auto keyed = [](const c10::IValue& value) {
    return value.isTensor() && value.toTensor().defined() && is_keyed(value.toTensor());
  };
  if (signature.care == Care::kRefuse && keyed((*stack)[first])) return;
  for (std::size_t i = first; i < stack->size(); ++i) {
    if (!keyed((*stack)[i])) continue;
    TORCH_CHECK(
        signature.care != Care::kRefuse, signature.name,
        ": an ordinary tensor cannot take over the memory of a paged one, which others may "
        "have at any time: use the paged tensor, a view of it (detach()) or a copy (clone())");
    (*stack)[i] = (*stack)[i].toTensor().clone();
  }
}

void see(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const PagingApi* api = paging_api();
  if (api == nullptr) {
    op.redispatchBoxed(below_key(keys), stack);
    return;
  }
  const Operation operation{op, keys, signature_of(op), *api};
  if (operation.signature.care != Care::kNone) take_care(operation.signature, stack);
  if (operation.signature.lets_through(op)) return operation.go_on(stack);
  const Uses uses = uses_of(operation.signature, *stack);
  if (uses.ranges.empty()) return operation.go_on(stack);
  if (run_in_parts(operation, uses, stack)) return;
  operation.run_holding(uses.ranges, uses.device, stack);
}

// Operators that never have anything held are not even called for: those that only make views or
// look at sizes, and the composite ones that come most often. The others of these are let through
// when they are called, since a library may give them a kernel of its own at any time; one that
// does so for a frequent one has to read weights by torch's operations.
bool is_passed_by(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  if (name.rfind("aten::", 0) != 0) return false;
  const Signature& signature = signature_of(op);
  if (signature.care != Care::kNone) return false;
  const bool frequent = name == "aten::linear" || name == "aten::matmul";
  return signature.arguments.empty() || (frequent && signature.lets_through(op));
}

void pass_by(torch::Library& library) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op || op->hasKernelForDispatchKey(kKey) || !is_passed_by(*op)) continue;
    const std::string local = toString(name).substr(std::string("aten::").size());
    library.impl(local.c_str(), torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

void register_fallback() {
  // Never destroyed, so that the fallback stays for as long as tensors may have the key.
  static auto& library = *new torch::Library(torch::Library::IMPL, "_", kKey, __FILE__, __LINE__);
  static auto& aten = *new torch::Library(torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__);
  static const bool registered = [] {
    register_frequent(aten);
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&see>());
    pass_by(aten);
    return true;
  }();
  static_cast<void>(registered);
}

}  // namespace penstock::torch_dispatch
