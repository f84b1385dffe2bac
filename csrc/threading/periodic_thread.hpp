// A thread that runs a function every so often, and at once when asked to. After fork() the child
// has a copy of this object but no thread: asking there throws instead of waiting for ever, and
// destroying leaks what the missing thread may have locked. Thread-safe.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>

namespace penstock {

class PeriodicThread {
 public:
  /// @param work  Must not throw, and must not ask this object for anything.
  PeriodicThread(std::function<void()> work, std::chrono::milliseconds interval);
  /// Waits for a run that is under way.
  ~PeriodicThread();
  PeriodicThread(const PeriodicThread&) = delete;
  PeriodicThread& operator=(const PeriodicThread&) = delete;

  /// Waits until a run has ended that began after this call, for a limited time.
  /// @return whether one has. @throws Error in a forked child.
  bool run_now(std::chrono::milliseconds limit);

  bool in_owner_process() const noexcept;

 private:
  struct State;
  static void run(State& state);

  pid_t owner_;
  std::unique_ptr<State> state_;
};

}  // namespace penstock
