#include "threading/periodic_thread.hpp"

#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>

#include "error/error.hpp"
#include "threading/time_limit.hpp"

namespace penstock {

struct PeriodicThread::State {
  std::function<void()> work;
  std::chrono::milliseconds interval;
  std::mutex mutex;
  std::condition_variable asked;
  std::condition_variable ended;
  std::uint64_t wanted = 0;  // runs up to this number are to begin at once
  std::uint64_t begun = 0;
  std::uint64_t done = 0;  // the number of the last run that has ended
  bool closing = false;
  std::thread thread;
};

PeriodicThread::PeriodicThread(std::function<void()> work, std::chrono::milliseconds interval)
    : owner_(::getpid()), state_(std::make_unique<State>()) {
  state_->work = std::move(work);
  state_->interval = at_most_a_year(interval);
  state_->thread = std::thread([state = state_.get()] { run(*state); });
}

PeriodicThread::~PeriodicThread() {
  if (!in_owner_process()) {
    static_cast<void>(state_.release());
    return;
  }
  {
    const std::lock_guard lock(state_->mutex);
    state_->closing = true;
  }
  state_->asked.notify_all();
  state_->thread.join();
}

bool PeriodicThread::in_owner_process() const noexcept {
  return owner_ == ::getpid();
}

bool PeriodicThread::run_now(std::chrono::milliseconds limit) {
  if (!in_owner_process()) {
    throw Error(
        "Penstock's threads belong to the process that forked this one: set the cap after "
        "the fork, or start workers with the \"spawn\" method");
  }
  std::unique_lock lock(state_->mutex);
  const std::uint64_t number = state_->begun + 1;
  if (state_->wanted < number) state_->wanted = number;
  state_->asked.notify_all();
  return state_->ended.wait_for(lock, at_most_a_year(limit),
                                [&] { return state_->done >= number; });
}

void PeriodicThread::run(State& state) {
  std::unique_lock lock(state.mutex);
  for (;;) {
    state.asked.wait_for(lock, state.interval,
                         [&] { return state.closing || state.wanted > state.begun; });
    if (state.closing) return;
    const std::uint64_t number = ++state.begun;
    lock.unlock();
    state.work();
    lock.lock();
    state.done = number;
    state.ended.notify_all();
  }
}

}  // namespace penstock
