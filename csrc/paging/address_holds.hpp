// The addresses of paged tensors that a thread has taken for kernels that nobody sees (Triton's,
// ctypes, those that a compiler makes), and what is held for them. When such a kernel is launched
// cannot be known; that it was, when the thread goes on to its next operation on paged tensors, or
// when a call of a model ends. Until then what the thread has taken stays in place.
//
// Where there is no room for more, what was taken in scopes that are over goes: who takes an
// address says in which scope, such as the call of a module, and which scopes are still open. What
// was taken in none (0) goes one by one, the oldest first.
//
// A thread that takes no further step would hold for ever. So what it took is let go of when the
// thread ends, and when another one finds no room and nothing was taken for a second.
//
// One for each thread, known to all of them. Thread-safe.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "paging/paged_model.hpp"
#include "paging/paging_api.hpp"

namespace penstock {

class AddressHolds {
 public:
  AddressHolds();
  /// Lets go of all. The thread has ended.
  ~AddressHolds();
  AddressHolds(const AddressHolds&) = delete;
  AddressHolds& operator=(const AddressHolds&) = delete;

  /// Tells threads apart; never 0.
  std::uint64_t id() const noexcept { return id_; }
  /// Whether anything is held; asked by the thread itself.
  bool any() const noexcept { return any_.load(std::memory_order_relaxed); }
  bool covers(const PagingRange& range);

  void add(const std::shared_ptr<PagedModel>& model, PagedModel::AddressHold hold,
           const PagingRange& range, std::uint64_t scope);
  /// Lets go of all; the first failure is thrown when that is done.
  void release();
  /// Lets go of what was taken in scopes that are not open, or else of the oldest taken in none.
  /// @return whether there was something.
  bool release_ended(const std::vector<std::uint64_t>& open);

  /// Lets go of what other threads have held for a second without taking more.
  /// @return whether they still hold something.
  static bool release_idle();
  /// Lets go of what a thread has taken; nothing where it has ended.
  static void release_of(std::uint64_t thread);

 private:
  struct Held {
    std::weak_ptr<PagedModel> model;  // whose tensors keep it, as long as there are any
    PagedModel::AddressHold hold;
    PagingRange range;
    std::uint64_t scope;
  };
  using Clock = std::chrono::steady_clock;

  // With the mutex of all of them held.
  std::vector<Held> take_all();
  static void let_go(std::vector<Held> taken);

  const std::uint64_t id_;
  const std::thread::id thread_;
  std::atomic<bool> any_{false};
  unsigned generation_ = 0;  // of forks, in which the first of them was taken
  std::vector<Held> held_;
  Clock::time_point latest_;  // when something was taken
};

}  // namespace penstock
