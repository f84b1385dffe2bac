// What schemas do not say about operators, by name. Everything here was found by reading the
// schemas of all operators of torch 2.13, and by running torch's own samples of its operators on
// memory that faults when it is read or written without having been held
// (tests/python/dispatch/test_torch_dispatch.py has a part of that).
#pragma once

#include <string_view>

namespace penstock::torch_dispatch {

/// Whether the operator looks at sizes, strides and dtypes only, or replaces them: no value of any
/// argument is read or written. @param name  Without the namespace "aten".
bool looks_at_no_values(std::string_view name);

/// Whether a composite operator takes addresses itself, besides calling other operators.
bool composite_takes_addresses(std::string_view name);

/// Whether an operator writes the argument though its schema has no annotation that says so. Where
/// the operator has an argument for training, only if that is true. @param name  With namespace.
bool writes_silently(std::string_view name, std::string_view argument);

/// Whether this is the name of an argument that says if running statistics are updated.
bool says_training(std::string_view argument);

/// Whether the elements of the operator's lists are independent of each other: it may run on some
/// of them after the others, with the same bits.
bool runs_by_elements(std::string_view name);

/// Whether the operator makes a sparse tensor that keeps the memory of its arguments, without their
/// key: it is given copies.
bool keeps_without_key(std::string_view name);

/// Whether the operator has its first argument take over the storage of another one.
bool takes_storage(std::string_view name);

/// Whether the operator joins a list of tensors into one.
bool joins_a_list(std::string_view name);

}  // namespace penstock::torch_dispatch
