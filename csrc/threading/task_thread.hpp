// A thread that runs tasks in the order in which they were given: the engine under the host
// device's streams and the pager's worker. After fork() the child has a copy of this object but no
// thread: submitting there throws instead of waiting for ever, and destroying leaks the queue,
// whose locks the missing thread may hold. Thread-safe.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>

namespace penstock {

class TaskThread {
 public:
  using Task = std::function<void()>;
  enum class AtEnd : bool { kFinish, kDrop };  ///< What becomes of queued tasks on destruction.
  enum class Order : bool { kBack, kFront };

  explicit TaskThread(AtEnd at_end);
  ~TaskThread();
  TaskThread(const TaskThread&) = delete;
  TaskThread& operator=(const TaskThread&) = delete;

  /// Queues a task, which must not throw. @throws Error in a forked child.
  void submit(Task task, Order order = Order::kBack);

  bool in_owner_process() const noexcept;
  /// @throws Error in a forked child.
  void require_owner_process() const;

 private:
  struct Queue;
  static void run(Queue& queue);

  pid_t owner_;
  AtEnd at_end_;
  std::unique_ptr<Queue> queue_;
};

}  // namespace penstock
