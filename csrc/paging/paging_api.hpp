// What the core offers to the library that sits in torch's dispatcher (torch_dispatch), as a table
// of functions: that library is built against the installed torch, and shares no other symbol with
// the core. It knows nothing of pages; the core knows nothing of torch.
//
// For each operation that reads or writes paged tensors: `begin` with the byte ranges of the views
// that it was given, then the operation, then `end`, on the same thread. Operations nest, also
// through Python; a range that an operation around it holds is not held twice. Neither function
// needs Python's global lock, and the caller should not hold it: they may wait. An exception comes
// as a new reference to a Python object; taking hold of it takes that lock. Most operations read
// what is in place to stay; `begin_at_once` and `end_at_once` are for these, and never wait.
//
// Who takes the address of a tensor, for a kernel that nobody sees, says so by `hold_address`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

/// Bytes of one paged view.
struct PagingRange {
  const void* address;
  std::size_t nbytes;
  bool written;
};

/// What is about to run.
struct PagingOperation {
  const void* id;    ///< Tells operations apart; the same for each call of one.
  const char* name;  ///< For messages, such as "aten::mm"; it lives as long as the process.
  void* stream;      ///< On which it runs: a cudaStream_t, null on the host.
  bool in_backward;  ///< Whether autograd runs it for a backward pass.
};

struct PagingApi {
  static constexpr std::uint32_t kVersion = 3;
  static constexpr const char* kCapsule = "penstock.paging_api";

  std::uint32_t version;
  /// Has the ranges in place for later work of the stream, until `end`. Ranges of no model are left
  /// alone. @return what `end` takes; null where nothing is held. @param error  Set where it fails;
  /// nothing is held then, and the operation must not run.
  void* (*begin)(const PagingOperation* operation, const PagingRange* ranges, std::size_t count,
                 void** error);
  /// Lets go, whether the operation has failed or not. @param error  Set where that fails.
  void (*end)(void* held, void** error);
  /// What `begin` does, where nothing has to be waited for and nothing is written. @return whether
  /// that is so; if not, nothing has happened. @param held  What `end` takes.
  bool (*begin_at_once)(const PagingOperation* operation, const PagingRange* ranges,
                        std::size_t count, void** held) noexcept;
  /// What `end` does, for what `begin_at_once` gave. @return whether it could be done at once; if
  /// not, nothing has happened.
  bool (*end_at_once)(void* held) noexcept;
  /// How many bytes of paged tensors one part of an operation over a list is best given; a part has
  /// one element at least. SIZE_MAX where all of the ranges can be in place at once.
  std::size_t (*part_bytes)(const PagingRange* ranges, std::size_t count);
  /// Has a range in place for work that the thread gives to the stream before its next operation on
  /// paged tensors, and that may write to it. It is let go of when that operation begins, or when
  /// a call of a model ends. @param scope  Tells what else is let go of: see `AddressHolds`.
  /// @param patient  Whether to wait for other threads where there is no room.
  /// @return what `release_addresses` takes; 0 where nothing is held. @param error  Set where it
  /// fails; the address must not be used then.
  std::uint64_t (*hold_address)(const PagingOperation* operation, const PagingRange* range,
                                std::uint64_t scope, bool patient, void** error);
  /// Lets go of all addresses that a thread has taken, in any thread.
  void (*release_addresses)(std::uint64_t thread, void** error);
};

}  // namespace penstock
