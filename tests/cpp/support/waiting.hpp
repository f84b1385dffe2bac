// What tests wait with: a gate that one thread holds shut for another, a bounded wait for a
// condition, and a thread that must end. They end in a failed test, never in a hang.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <future>
#include <stdexcept>
#include <thread>
#include <utility>

namespace penstock::testing {

inline constexpr std::chrono::seconds kLongest{60};

/// Shut until opened. Opens when it goes, so that a test that fails early ends. Declare it before
/// what waits for it.
class Gate {
 public:
  Gate() = default;
  ~Gate() { open(); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void open() {
    if (!open_.exchange(true)) promise_.set_value();
  }
  void wait() const {
    const std::shared_future<void> opened = future_;  // outlives a gate that goes meanwhile
    if (opened.wait_for(kLongest) != std::future_status::ready) {
      throw std::runtime_error("nobody opened the gate");
    }
  }

 private:
  std::atomic<bool> open_{false};
  std::promise<void> promise_;
  std::shared_future<void> future_{promise_.get_future()};
};

/// Waits until `condition()`; @return whether it came true.
template <typename Condition>
bool eventually(Condition condition, std::chrono::milliseconds limit = kLongest) {
  const auto end = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return true;
}

/// Runs a function on a thread of its own, and hands its exception to `join`.
class Running {
 public:
  template <typename Function>
  explicit Running(Function function)
      : task_(std::move(function)), result_(task_.get_future()), thread_(std::ref(task_)) {}
  ~Running() {
    if (thread_.joinable()) thread_.join();
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  bool ended() const {
    return result_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  }
  void join() {
    thread_.join();
    result_.get();
  }

 private:
  std::packaged_task<void()> task_;
  std::future<void> result_;
  std::thread thread_;
};

}  // namespace penstock::testing
