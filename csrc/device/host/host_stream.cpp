#include "device/host/host_stream.hpp"

#include <utility>

namespace penstock {

void Completion::complete(std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
    time_ = std::chrono::steady_clock::now();
    error_ = std::move(error);
  }
  completed_.notify_all();
}

void Completion::wait() {
  std::unique_lock lock(mutex_);
  completed_.wait(lock, [&] { return done_; });
  if (error_) std::rethrow_exception(error_);
}

bool Completion::done() {
  const std::lock_guard lock(mutex_);
  return done_;
}

std::chrono::steady_clock::time_point Completion::time() {
  const std::lock_guard lock(mutex_);
  return time_;
}

std::shared_ptr<Completion> HostEvent::record() {
  const std::lock_guard lock(mutex_);
  latest_ = std::make_shared<Completion>();
  return latest_;
}

std::shared_ptr<Completion> HostEvent::latest() {
  const std::lock_guard lock(mutex_);
  return latest_;
}

void HostStream::submit(std::function<void()> task) {
  thread_.submit([this, task = std::move(task)] {
    if (error_) return;
    try {
      task();
    } catch (...) {
      error_ = std::current_exception();
    }
  });
}

void HostStream::record(HostEvent& event) {
  thread_.submit([this, completion = event.record()] {
    completion->complete(std::exchange(error_, nullptr));
  });
}

void HostStream::wait(HostEvent& event) {
  const auto completion = event.latest();
  if (!completion) return;
  // Not skipped after an error, as other tasks are: what is submitted behind the next record runs
  // again, and still counts on this order.
  thread_.submit([this, completion] {
    try {
      completion->wait();
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
  });
}

void HostStream::synchronize() {
  HostEvent event;
  record(event);
  event.latest()->wait();
}

}  // namespace penstock
