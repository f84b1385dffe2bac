#include "allocator/pressure_log.hpp"

#include <unistd.h>

#include "threading/time_limit.hpp"

namespace penstock {

namespace {

constexpr std::size_t kNearPart = 20;  // of the cap: so much less in use than the cap is near

}  // namespace

PressureLog::PressureLog()
    : pushed_(std::make_unique<std::condition_variable>()), owner_(::getpid()) {}

PressureLog::~PressureLog() {
  if (owner_ != ::getpid()) static_cast<void>(pushed_.release());
}

void PressureLog::set_listening(bool listening) {
  const std::lock_guard lock(mutex_);
  listening_.store(listening, std::memory_order_relaxed);
  near_.store(false, std::memory_order_relaxed);
  count_ = 0;
  woken_ = false;
}

void PressureLog::note_use(std::size_t asked, const BudgetStats& ledger) {
  const bool near = ledger.used >= ledger.cap - ledger.cap / kNearPart;
  if (near_.exchange(near, std::memory_order_relaxed) || !near) return;
  push(PressureKind::kNear, asked, ledger, 0);
}

void PressureLog::note_room(std::size_t asked, const BudgetStats& ledger, std::size_t given) {
  given_.fetch_add(given, std::memory_order_relaxed);
  if (listening()) push(PressureKind::kMadeRoom, asked, ledger, given);
}

void PressureLog::note_refusal(std::size_t asked, const BudgetStats& ledger) {
  if (listening()) push(PressureKind::kRefused, asked, ledger, 0);
}

void PressureLog::push(PressureKind kind, std::size_t asked, const BudgetStats& ledger,
                       std::size_t given) {
  {
    const std::lock_guard lock(mutex_);
    if (count_ == kCapacity) {
      ++dropped_;
      return;
    }
    events_[(first_ + count_) % kCapacity] = {
        kind, asked, ledger.cap, ledger.used, ledger.cap - ledger.used, given};
    ++count_;
  }
  pushed_->notify_one();
}

std::vector<PressureEvent> PressureLog::take(std::chrono::milliseconds limit) {
  std::vector<PressureEvent> taken;
  taken.reserve(kCapacity);  // not under the lock
  std::unique_lock lock(mutex_);
  pushed_->wait_for(lock, at_most_a_year(limit), [&] { return count_ > 0 || woken_; });
  woken_ = false;
  for (; count_ > 0; --count_, first_ = (first_ + 1) % kCapacity) taken.push_back(events_[first_]);
  return taken;
}

void PressureLog::wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  pushed_->notify_all();
}

std::uint64_t PressureLog::dropped() const {
  const std::lock_guard lock(mutex_);
  return dropped_;
}

}  // namespace penstock
