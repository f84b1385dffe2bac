// Who makes room takes a turn, so that of several requests that each fit, but not together, one
// goes through and not none, each holding half of what is there. A turn is a courtesy and no lock:
// after a while who waits for one goes on without, so nothing that happens while room is made can
// make it wait for ever, and a thread that has the turn may ask again. Thread-safe.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace penstock {

class PressureTurn {
 public:
  /// A turn, once it is taken, for as long as the object lives.
  class Hold {
   public:
    explicit Hold(PressureTurn& turn) noexcept : turn_(turn) {}
    ~Hold() {
      if (!mine_) return;
      {
        const std::lock_guard lock(turn_.mutex_);
        turn_.taken_ = false;
      }
      turn_.dropped_.notify_one();
    }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    /// Waits for the turn, for a limited time. The caller holds no lock.
    void take() {
      taken_ = true;
      std::unique_lock lock(turn_.mutex_);
      if (turn_.taken_ && turn_.owner_ == std::this_thread::get_id()) return;
      mine_ = turn_.dropped_.wait_for(lock, kPatience, [&] { return !turn_.taken_; });
      if (!mine_) return;
      turn_.taken_ = true;
      turn_.owner_ = std::this_thread::get_id();
    }
    /// Whether `take` was called.
    bool taken() const noexcept { return taken_; }

   private:
    PressureTurn& turn_;
    bool taken_ = false;
    bool mine_ = false;
  };

 private:
  static constexpr std::chrono::seconds kPatience{1};

  std::mutex mutex_;
  std::condition_variable dropped_;
  bool taken_ = false;
  std::thread::id owner_;
};

}  // namespace penstock
