#include "device/host_stream.hpp"

#include <utility>

namespace penstock {

std::uint64_t HostEvent::begin_record() {
  const std::lock_guard lock(mutex_);
  return ++recorded_generation_;
}

void HostEvent::complete(std::uint64_t generation, std::exception_ptr error) {
  {
    const std::lock_guard lock(mutex_);
    completed_generation_ = generation;
    error_ = std::move(error);
  }
  completed_.notify_all();
}

void HostEvent::wait_for(std::uint64_t generation) {
  std::unique_lock lock(mutex_);
  completed_.wait(lock, [&] { return completed_generation_ >= generation; });
  if (error_) std::rethrow_exception(error_);
}

void HostEvent::wait() {
  std::uint64_t generation = 0;
  {
    const std::lock_guard lock(mutex_);
    generation = recorded_generation_;
  }
  wait_for(generation);
}

bool HostEvent::done() {
  const std::lock_guard lock(mutex_);
  return completed_generation_ >= recorded_generation_;
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

void HostStream::record(std::shared_ptr<HostEvent> event) {
  const std::uint64_t generation = event->begin_record();
  thread_.submit([this, generation, event = std::move(event)] {
    event->complete(generation, std::exchange(error_, nullptr));
  });
}

void HostStream::wait(std::shared_ptr<HostEvent> event) {
  std::uint64_t generation = 0;
  {
    const std::lock_guard lock(event->mutex_);
    generation = event->recorded_generation_;
  }
  submit([generation, event = std::move(event)] { event->wait_for(generation); });
}

void HostStream::synchronize() {
  const auto event = std::make_shared<HostEvent>();
  record(event);
  event->wait();
}

}  // namespace penstock
