// The ranges that one operation holds, from its begin to its end, through the table of functions
// that the core has given. Python's global lock is let go of around both calls where this thread
// has it, since they may wait for the link and for other threads.
//
// An error comes from the core as a Python object. It is thrown as torch's own `python_error`,
// which carries the object itself through C++, also out of autograd's threads, to whoever called
// torch.
#pragma once

#include <functional>

#include "paging/paging_api.hpp"
#include "torch_dispatch/ranges.hpp"

namespace penstock::torch_dispatch {

/// The functions in use; null before any were installed, and once Python is ending.
const PagingApi* paging_api();

/// Uses these functions from now on. They have to live as long as the process.
void install(const PagingApi* api);

/// Calls a function of the core's, which sets the error that it is given. Python's global lock is
/// let go of meanwhile where this thread has it. @throws python_error with the core's exception.
void call_core(const std::function<void(void** error)>& function);

class HeldRanges {
 public:
  /// Has the ranges in place. @throws python_error with the core's exception; nothing is held then.
  HeldRanges(const PagingApi& api, const PagingOperation& operation, const Ranges& ranges);
  /// Lets go after an operation that has failed, whose error is the one that counts.
  ~HeldRanges();
  HeldRanges(const HeldRanges&) = delete;
  HeldRanges& operator=(const HeldRanges&) = delete;

  /// Lets go. @throws python_error with the core's exception.
  void release();

 private:
  void end(void** error);

  const PagingApi& api_;
  void* held_ = nullptr;
};

}  // namespace penstock::torch_dispatch
