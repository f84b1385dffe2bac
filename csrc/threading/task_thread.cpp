#include "threading/task_thread.hpp"

#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "error/error.hpp"

namespace penstock {

struct TaskThread::Queue {
  std::mutex mutex;
  std::condition_variable submitted;
  std::deque<Task> tasks;
  bool closing = false;
  std::thread thread;
};

TaskThread::TaskThread(AtEnd at_end)
    : owner_(::getpid()), at_end_(at_end), queue_(std::make_unique<Queue>()) {
  queue_->thread = std::thread([queue = queue_.get()] { run(*queue); });
}

TaskThread::~TaskThread() {
  if (!in_owner_process()) {
    static_cast<void>(queue_.release());
    return;
  }
  std::deque<Task> dropped;  // destroyed without the lock: a task's end may call anything
  {
    const std::lock_guard lock(queue_->mutex);
    queue_->closing = true;
    if (at_end_ == AtEnd::kDrop) dropped.swap(queue_->tasks);
  }
  queue_->submitted.notify_all();
  queue_->thread.join();
}

bool TaskThread::in_owner_process() const noexcept {
  return owner_ == ::getpid();
}

void TaskThread::require_owner_process() const {
  if (in_owner_process()) return;
  throw Error(
      "Penstock's threads belong to the process that forked this one: create the manager after "
      "the fork, or start workers with the \"spawn\" method");
}

void TaskThread::submit(Task task, Order order) {
  require_owner_process();
  {
    const std::lock_guard lock(queue_->mutex);
    auto& tasks = queue_->tasks;
    tasks.insert(order == Order::kFront ? tasks.begin() : tasks.end(), std::move(task));
  }
  queue_->submitted.notify_one();
}

void TaskThread::run(Queue& queue) {
  for (;;) {
    Task task;
    {
      std::unique_lock lock(queue.mutex);
      queue.submitted.wait(lock, [&] { return queue.closing || !queue.tasks.empty(); });
      if (queue.tasks.empty()) return;
      task = std::move(queue.tasks.front());
      queue.tasks.pop_front();
    }
    task();
  }
}

}  // namespace penstock
