// Streams and events of the host device. A HostStream is a thread that runs its tasks in order; a
// HostEvent stands for a point in that order. As on a GPU, submitting returns at once and
// the outcome is seen later: the first task that throws makes the tasks behind it skip, and the
// next event recorded on the stream carries the error to whoever waits for it. The stream then
// works again.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

#include "threading/task_thread.hpp"

namespace penstock {

/// The state that an event's owner, the recording stream and the waiting ones share.
class HostEvent {
 public:
  /// Announces that a later `complete` belongs to a new record of the event.
  std::uint64_t begin_record();
  void complete(std::uint64_t generation, std::exception_ptr error);
  /// Blocks until the record that was the latest at the call. @throws the error it carries.
  void wait();
  bool done();

 private:
  friend class HostStream;
  void wait_for(std::uint64_t generation);

  std::mutex mutex_;
  std::condition_variable completed_;
  std::uint64_t recorded_generation_ = 0;
  std::uint64_t completed_generation_ = 0;
  std::exception_ptr error_;
};

class HostStream {
 public:
  void submit(std::function<void()> task);
  void record(std::shared_ptr<HostEvent> event);
  void wait(std::shared_ptr<HostEvent> event);
  /// Blocks until all that was submitted has run. @throws the pending error.
  void synchronize();

 private:
  std::exception_ptr error_;  // touched by the thread only
  TaskThread thread_{TaskThread::AtEnd::kFinish};
};

}  // namespace penstock
