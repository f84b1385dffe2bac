#include "torch_dispatch/signature.hpp"

#include <ATen/core/jit_type.h>

#include "torch_dispatch/operator_rules.hpp"
#include "torch_dispatch/signature_table.hpp"

namespace penstock::torch_dispatch {

namespace {

enum class Kind : std::uint8_t { kOther, kTensor, kList };

Kind kind_of(const c10::TypePtr& type) {
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
    case c10::TypeKind::AnyType:
      return Kind::kTensor;
    case c10::TypeKind::OptionalType:
      return kind_of(type->expectRef<c10::OptionalType>().getElementType());
    case c10::TypeKind::ListType:
      return kind_of(type->expectRef<c10::ListType>().getElementType()) == Kind::kOther
                 ? Kind::kOther
                 : Kind::kList;
    default:
      return Kind::kOther;
  }
}

// Whether two annotations name the same memory. That of a list has the one of its elements inside.
bool meet(const c10::AliasInfo& one, const c10::AliasInfo& other) {
  for (const auto& set : one.beforeSets()) {
    if (other.beforeSets().count(set) != 0) return true;
  }
  for (const auto& inner : one.containedTypes()) {
    if (meet(inner, other)) return true;
  }
  for (const auto& inner : other.containedTypes()) {
    if (meet(one, inner)) return true;
  }
  return false;
}

bool shares(const c10::FunctionSchema& schema, const c10::AliasInfo& alias) {
  for (const auto& result : schema.returns()) {
    const auto* other = result.alias_info();
    if (other != nullptr && !other->isWrite() && meet(alias, *other)) return true;
  }
  return false;
}

bool has_write(const c10::FunctionSchema& schema) {
  for (const auto& argument : schema.arguments()) {
    if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) return true;
  }
  return false;
}

// Torch's own collectives (c10d) write without saying so; by their names all of them are in place.
bool in_place_by_name(std::string_view name) {
  return name.ends_with('_') && !name.ends_with("__");
}

Parts parts_of(const c10::FunctionSchema& schema, std::string_view name) {
  if (joins_a_list(name) && schema.overload_name().empty()) return Parts::kJoin;
  if (!runs_by_elements(name)) return Parts::kNone;
  for (const auto& result : schema.returns()) {
    if (kind_of(result.type()) != Kind::kList) return Parts::kNone;
  }
  return Parts::kElements;
}

}  // namespace

std::unique_ptr<Signature> parse(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  auto made = std::make_unique<Signature>();
  made->name = schema.name();
  made->count = static_cast<std::uint32_t>(schema.arguments().size());
  std::string_view base = made->name;
  const auto colons = base.find("::");
  const bool aten = base.substr(0, colons) == "aten";
  base.remove_prefix(colons == std::string_view::npos ? 0 : colons + 2);
  if (aten && keeps_without_key(base)) made->care = Care::kCopy;
  if (aten && takes_storage(base)) made->care = Care::kRefuse;
  if (aten && looks_at_no_values(base)) return made;
  // Operators of other libraries may be composite by registration and yet take addresses.
  made->composite = aten &&
                    op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd) &&
                    !composite_takes_addresses(base);
  if (aten) made->parts = parts_of(schema, base);
  const bool all_written = !aten && in_place_by_name(base) && !has_write(schema);
  for (std::uint32_t index = 0; index < made->count; ++index) {
    const auto& argument = schema.arguments()[index];
    if (says_training(argument.name())) made->training = static_cast<std::int32_t>(index);
    const Kind kind = kind_of(argument.type());
    if (kind == Kind::kOther) continue;
    Access access = Access::kRead;
    if (const auto* alias = argument.alias_info()) {
      if (alias->isWrite()) {
        access = Access::kWrite;
      } else if (aten && shares(schema, *alias)) {
        continue;
      }
    } else if (all_written) {
      access = Access::kWrite;
    } else if (writes_silently(made->name, argument.name())) {
      access = Access::kWriteInTraining;
    }
    made->arguments.push_back({index, access, kind == Kind::kList});
  }
  if (made->training < 0) {
    for (auto& argument : made->arguments) {
      if (argument.access == Access::kWriteInTraining) argument.access = Access::kWrite;
    }
  }
  return made;
}

bool Signature::lets_through(const c10::OperatorHandle& op) const {
  if (arguments.empty()) return true;
  if (!composite) return false;
  // Torch prefers the composite kernel to one for all of autograd, but not to these.
  static constexpr c10::DispatchKeySet kBackends({c10::DispatchKey::CPU, c10::DispatchKey::CUDA,
                                                  c10::DispatchKey::AutogradCPU,
                                                  c10::DispatchKey::AutogradCUDA});
  return !op.hasKernelForAnyDispatchKey(kBackends) &&
         !op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd);
}

const Signature& signature_of(const c10::OperatorHandle& op) {
  static SignatureTable& table = *new SignatureTable;  // outlives every thread
  return table.find(op);
}

}  // namespace penstock::torch_dispatch
