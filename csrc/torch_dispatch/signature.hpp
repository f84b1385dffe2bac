// What an operator does with the tensors that it is given, taken from its schema once and kept.
//
// An argument is written where its annotation says so; only viewed, which reads nothing, where its
// annotation does not say so and a result shares its memory; else read. `operator_rules` has the
// exceptions. Operators that torch composes of other ones are let through: nothing is held for
// them, and their parts come to the fallback by themselves.
//
// Signatures live as long as the process, so pointers to them and to their names stay good. Looking
// one up takes no lock. Thread-safe.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <string>
#include <vector>

namespace penstock::torch_dispatch {

enum class Access : std::uint8_t {
  kRead,
  kWrite,
  kWriteInTraining,  ///< Read, and written if the argument that says whether it trains is true.
};

/// How an operation over a list may be run in parts.
enum class Parts : std::uint8_t { kNone, kElements, kJoin };

struct Argument {
  std::uint32_t index;
  Access access;
  bool list;  ///< Of tensors, of optional tensors, or of such lists.
};

/// What is to be done with keyed arguments beside holding them.
enum class Care : std::uint8_t {
  kNone,
  kCopy,    ///< Copies are given in their place.
  kRefuse,  ///< They are refused, unless the first argument has the key too.
};

struct Signature {
  std::string name;                 ///< Such as "aten::mm".
  std::vector<Argument> arguments;  ///< Those that may be tensors of which values are used.
  std::uint32_t count = 0;          ///< Of all arguments.
  std::int32_t training = -1;       ///< Index of the argument that says whether it trains.
  bool composite = false;           ///< Composed of others, unless a backend has its own kernel.
  Parts parts = Parts::kNone;
  Care care = Care::kNone;

  /// Whether nothing has to be held for the operation. Composition is looked at anew in each call,
  /// since a library may register a kernel of its own at any time.
  bool lets_through(const c10::OperatorHandle& op) const;
};

/// Returns the operator's signature.
const Signature& signature_of(const c10::OperatorHandle& op);

}  // namespace penstock::torch_dispatch
