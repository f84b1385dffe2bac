// Streams and events of the host device. A HostStream is a thread that runs its tasks in order; a
// HostEvent stands for a point in that order. As on a GPU, submitting returns at once and
// the outcome is seen later: the first task that throws makes the tasks behind it skip, and the
// next event recorded on the stream carries the error to whoever waits for it. The stream then
// works again.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "threading/task_thread.hpp"

namespace penstock {

/// One record of an event: done once the stream comes to it, with the error of the work before and
/// the time.
class Completion {
 public:
  void complete(std::exception_ptr error);
  /// Blocks until complete. @throws the error.
  void wait();
  bool done();
  /// When it was completed.
  std::chrono::steady_clock::time_point time();

 private:
  std::mutex mutex_;
  std::condition_variable completed_;
  bool done_ = false;
  std::exception_ptr error_;
  std::chrono::steady_clock::time_point time_;
};

/// Stands for its latest record; who waited for an earlier one goes on waiting for that.
class HostEvent {
 public:
  /// Starts a record, which someone has to complete.
  std::shared_ptr<Completion> record();
  /// The latest record; null if there was none, and so nothing to wait for.
  std::shared_ptr<Completion> latest();

 private:
  std::mutex mutex_;
  std::shared_ptr<Completion> latest_;
};

class HostStream {
 public:
  void submit(std::function<void()> task);
  void record(HostEvent& event);
  void wait(HostEvent& event);
  /// Blocks until all that was submitted has run. @throws the pending error.
  void synchronize();

 private:
  std::exception_ptr error_;  // touched by the thread only
  TaskThread thread_{TaskThread::AtEnd::kFinish};
};

}  // namespace penstock
