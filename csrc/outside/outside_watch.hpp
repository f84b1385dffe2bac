// Charges the cap for what the process holds on the device without the ledger: the CUDA context,
// kernels that are loaded when they are first called, libraries that ask the driver themselves
// (NCCL), page tables. Nobody asks before taking such memory, so it is looked at, every ten
// milliseconds and on request, and a reserve is charged on top: what grows between two looks by no
// more than the reserve has not crossed the cap.
//
// What is charged, under Tag::kOutside, is the estimate and the reserve. Growth that does not fit
// has others make room (FramePool::make_room); where there is none, all that is left is charged,
// and it is tried again with each look. That the reserve is used up, and so the cap crossed, is on
// record with the device, once each time it happens.
//
// Threads: a thread of its own looks, charges and releases, and holds no lock meanwhile, as sources
// of room may take their own; figures are read under a lock. In a forked child there is no thread,
// and nothing is touched. Errors of the device leave the charge as it is and are on record, once
// for each row of them. The watch owns its charge, and releases it when it goes. Thread-safe.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

#include "error/error.hpp"
#include "frame_pool/frame_pool.hpp"
#include "outside/outside_estimate.hpp"
#include "threading/periodic_thread.hpp"

namespace penstock {

struct OutsideOptions {
  std::size_t reserve = 0;  ///< Bytes to charge beyond what is held.
  std::chrono::milliseconds interval{10};
};

struct OutsideStats {
  std::size_t held = 0;       ///< Outside of the ledger, in bytes, as estimated.
  std::size_t reserve = 0;    ///< Bytes to be charged on top.
  std::size_t charged = 0;    ///< Bytes; less than both together where there is no room.
  bool whole_device = false;  ///< Others on the device are counted along.
  std::uint64_t looks = 0;
  std::uint64_t discarded = 0;  ///< Looks during which the ledger changed, again and again.
};

class OutsideWatch {
 public:
  /// Looks once, and then from time to time.
  /// @throws std::invalid_argument where the device cannot tell what the process holds,
  ///         CapExceededError where that and the reserve do not fit, DeviceError.
  OutsideWatch(std::shared_ptr<FramePool> pool, OutsideOptions options);
  ~OutsideWatch();
  OutsideWatch(const OutsideWatch&) = delete;
  OutsideWatch& operator=(const OutsideWatch&) = delete;

  /// Waits until it has looked, from now on, and charged what it saw; for a limited time.
  /// @return whether it has; not so after `stop`. @throws Error in a forked child.
  bool look(std::chrono::milliseconds limit);
  /// Ends the thread; what is charged stays so. Not while others call `look`.
  void stop();
  /// Changes the reserve, from the next look on.
  void set_reserve(std::size_t nbytes);
  OutsideStats stats() const;

 private:
  void look_quietly() noexcept;
  void look_and_charge();
  bool measure();
  void charge(std::size_t wanted);
  void set_charged(std::size_t nbytes);
  void report_crossing();
  CapExceededError refusal() const;

  std::shared_ptr<FramePool> pool_;
  OutsideEstimate estimate_;  // the thread's own, as the two below
  bool failing_ = false;
  bool crossing_ = false;
  mutable std::mutex mutex_;
  OutsideStats stats_;
  std::unique_ptr<PeriodicThread> thread_;
};

}  // namespace penstock
