// Operations over lists that do not fit as a whole run in parts, with the same bits.
//
// Where the elements of the lists are independent of each other (foreach, fused optimizers), a part
// is the operation on a run of consecutive elements. Where a list is joined into one tensor (cat,
// stack), runs of it are joined, and then the results. A part holds its own ranges only. It has at
// least one element, which may be more than was asked for.
//
// Whatever looks odd runs whole: tensors that are wrappers of others, modes that look at
// operations, lists of different lengths (torch refuses them), dtypes that differ. An operation
// that fails in a later part has done the earlier ones.
#pragma once

#include "torch_dispatch/operation.hpp"

namespace penstock::torch_dispatch {

/// Runs the operation on top of the stack in parts, if it can be and has to be.
/// @param uses  Of the whole operation. @return  Whether it has run.
bool run_in_parts(const Operation& operation, const Uses& uses, torch::jit::Stack* stack);

/// What is cut into runs: all lists of one length.
class Runs {
 public:
  /// @param limit  Bytes of keyed tensors in one run, at most, if it has more than one element.
  Runs(std::size_t length, std::size_t limit) : bytes_(length, 0), limit_(limit) {}
  /// Counts the keyed bytes of a list of that length.
  void count(c10::ArrayRef<c10::IValue> list);
  /// Returns where the run that begins there ends.
  std::size_t end_of(std::size_t begin) const;

 private:
  std::vector<std::size_t> bytes_;  // by element
  std::size_t limit_;
};

/// Returns some elements of a list, as a list of the same type.
c10::IValue cut(const c10::IValue& list, std::size_t begin, std::size_t end);

/// Runs it on part after part of its elements.
bool run_by_elements(const Operation& operation, std::size_t limit, torch::jit::Stack* stack);

/// Joins parts of its list, then the results.
bool run_by_joining(const Operation& operation, std::size_t limit, torch::jit::Stack* stack);

}  // namespace penstock::torch_dispatch
