#include "torch_dispatch/frequent.hpp"

#include <ATen/ops/add_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/convolution_ops.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/native_group_norm_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>

#include <optional>
#include <utility>

#include "torch_dispatch/held_ranges.hpp"
#include "torch_dispatch/operation.hpp"

namespace penstock::torch_dispatch {

namespace {

void read(const at::Tensor& tensor, Uses& uses) {
  use(tensor, false, uses);
}

void read(const std::optional<at::Tensor>& tensor, Uses& uses) {
  if (tensor) use(*tensor, false, uses);
}

template <class Other>
void read(const Other& /*argument*/, Uses& /*uses*/) {}

// An operator that only reads its arguments, by torch's own declaration of it.
template <class Operator, class Schema>
struct Kernel;

template <class Operator, class Result, class... Arguments>
struct Kernel<Operator, Result(Arguments...)> {
  static Result run(c10::DispatchKeySet keys, Arguments... arguments) {
    Uses uses;
    (read(arguments, uses), ...);
    const PagingApi* api = paging_api();
    if (api == nullptr || uses.ranges.empty()) {
      return Operator::redispatch(below_key(keys), std::forward<Arguments>(arguments)...);
    }
    static const Signature& signature = signature_of(
        c10::Dispatcher::singleton().findSchemaOrThrow(Operator::name, Operator::overload_name));
    HeldRanges held(*api, paging_operation(signature, uses.device), uses.ranges);
    Result result = Operator::redispatch(below_key(keys), std::forward<Arguments>(arguments)...);
    held.release();
    return result;
  }
};

template <class Operator>
void add(torch::Library& aten, const char* name) {
  aten.impl(name, &Kernel<Operator, typename Operator::schema>::run);
}

}  // namespace

void register_frequent(torch::Library& aten) {
  add<at::_ops::mm>(aten, "mm");
  add<at::_ops::addmm>(aten, "addmm");
  add<at::_ops::bmm>(aten, "bmm");
  add<at::_ops::baddbmm>(aten, "baddbmm");
  add<at::_ops::add_Tensor>(aten, "add.Tensor");
  add<at::_ops::mul_Tensor>(aten, "mul.Tensor");
  add<at::_ops::convolution>(aten, "convolution");
  add<at::_ops::embedding>(aten, "embedding");
  add<at::_ops::native_layer_norm>(aten, "native_layer_norm");
  add<at::_ops::native_group_norm>(aten, "native_group_norm");
}

}  // namespace penstock::torch_dispatch
