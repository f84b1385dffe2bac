// What the allocator went through where memory was short, for whoever wants to be told: a bounded
// ring between the threads that allocate and one that listens. Who allocates never waits for a
// listener: where the ring is full, or nobody listens, the event is dropped; the former is counted.
// One mutex, held for copying an event and no more. Thread-safe.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "budget/budget.hpp"

namespace penstock {

enum class PressureKind : std::uint8_t {
  kNear,      ///< More of the cap is in use than a twentieth below it, and was not before.
  kMadeRoom,  ///< Others gave frames back for a request.
  kRefused,   ///< A request was refused.
};

/// One event; sizes in bytes.
struct PressureEvent {
  PressureKind kind = PressureKind::kNear;
  std::size_t asked = 0;  ///< By the request.
  std::size_t cap = 0;
  std::size_t used = 0;
  std::size_t available = 0;
  std::size_t given = 0;  ///< By others, for the request.
};

class PressureLog {
 public:
  static constexpr std::size_t kCapacity = 256;

  PressureLog();
  ~PressureLog();
  PressureLog(const PressureLog&) = delete;
  PressureLog& operator=(const PressureLog&) = delete;

  /// Whether anybody is to be told from now on; what was not taken is forgotten.
  void set_listening(bool listening);
  bool listening() const noexcept { return listening_.load(std::memory_order_relaxed); }

  /// Notes that `ledger` was found after a request of `asked` bytes got its frames.
  void note_use(std::size_t asked, const BudgetStats& ledger);
  void note_room(std::size_t asked, const BudgetStats& ledger, std::size_t given);
  void note_refusal(std::size_t asked, const BudgetStats& ledger);

  /// Takes all events, waiting for one up to `limit`, or until `wake`. Empty where there is none.
  std::vector<PressureEvent> take(std::chrono::milliseconds limit);
  /// Has who waits, or who does next, return.
  void wake();

  std::uint64_t dropped() const;  ///< Events for which there was no room.
  /// Bytes that others gave for requests so far.
  std::uint64_t given_bytes() const noexcept { return given_.load(std::memory_order_relaxed); }

 private:
  void push(PressureKind kind, std::size_t asked, const BudgetStats& ledger, std::size_t given);

  std::atomic<bool> listening_{false};
  std::atomic<std::uint64_t> given_{0};
  std::atomic<bool> near_{false};
  mutable std::mutex mutex_;
  // In a forked child it looks as if the listener still waited, and destroying it would wait for
  // that to end; so it is leaked there.
  std::unique_ptr<std::condition_variable> pushed_;
  pid_t owner_;
  std::array<PressureEvent, kCapacity> events_{};
  std::size_t first_ = 0;
  std::size_t count_ = 0;
  std::uint64_t dropped_ = 0;
  bool woken_ = false;
};

}  // namespace penstock
