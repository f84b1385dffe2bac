// The budget is the ledger that hands the cap out. Every byte of device memory that Penstock makes
// resident is charged to a tag before the device is asked for it, and released after the device has
// let go of it, so the sum of the tags is an upper bound of what is held, at every instant.
//
// A charge adds, compares and, where it does not fit, leaves the ledger as it was; nothing is ever
// granted first and repaired later. One mutex guards all figures, so that every snapshot is exact.
// All functions are thread-safe. The budget knows nothing of devices, pages or models.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace penstock {

/// What charged bytes are used for.
enum class Tag : std::uint8_t { kWeights, kActivations, kWorkspace, kCache, kOutside };
inline constexpr std::size_t kTagCount = 5;

/// "weights", "activations", ...
const char* tag_name(Tag tag) noexcept;

/// One consistent reading of the ledger. All figures are in bytes but `refused`.
struct BudgetStats {
  std::size_t cap = 0;
  std::size_t used = 0;  ///< Sum of `used_by_tag`; never above `cap`.
  std::size_t peak = 0;  ///< Largest `used` since the last reset.
  std::array<std::size_t, kTagCount> used_by_tag{};
  std::array<std::size_t, kTagCount> peak_by_tag{};
  std::uint64_t refused = 0;     ///< Charges that did not fit (waits that gave up too).
  std::uint64_t version = 0;     ///< Grows with each charge and each release.
  std::uint64_t charged = 0;     ///< All bytes that were ever charged, released ones too.
  std::uint32_t in_transit = 0;  ///< Who is about to make charged bytes real, or to release them.
};

class Budget {
 public:
  /// @param cap  Bytes to hand out.
  explicit Budget(std::size_t cap);
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

  /// Charges `nbytes` to `tag` if they fit. @return whether they did.
  [[nodiscard]] bool try_charge(Tag tag, std::size_t nbytes);

  /// Charges `nbytes`, waiting up to `limit` for others to release. Waiters have no order among
  /// themselves: a small request may overtake a large one. @return whether the bytes were charged.
  [[nodiscard]] bool charge_within(Tag tag, std::size_t nbytes, std::chrono::milliseconds limit);

  /// Charges `nbytes`. @throws CapExceededError with the ledger's figures where they do not fit.
  void charge(Tag tag, std::size_t nbytes);

  /// Charges as much of `nbytes` as fits. @return what was charged.
  std::size_t charge_up_to(Tag tag, std::size_t nbytes);

  /// Gives back `nbytes` of `tag`. @throws std::logic_error if the tag holds less.
  void release(Tag tag, std::size_t nbytes);

  /// Changes the cap. @return false, changing nothing, where more than `cap` bytes are in use.
  [[nodiscard]] bool try_set_cap(std::size_t cap);

  std::size_t cap() const;
  std::size_t available() const;  ///< Bytes that could be charged now.
  BudgetStats stats() const;
  void reset_peaks();  ///< Peaks start again from what is in use now.

 private:
  friend class InTransit;
  bool fits(std::size_t nbytes) const { return nbytes <= stats_.cap - stats_.used; }
  void add(Tag tag, std::size_t nbytes);

  mutable std::mutex mutex_;
  std::condition_variable released_;
  BudgetStats stats_;
};

/// A charge that is taken back unless it is kept: what makes a failure between charging and using
/// the bytes leave the ledger balanced.
class ScopedCharge {
 public:
  /// Adopts `nbytes` that were charged to `tag` before.
  ScopedCharge(Budget& budget, Tag tag, std::size_t nbytes) noexcept
      : budget_(&budget), tag_(tag), nbytes_(nbytes) {}
  ScopedCharge(const ScopedCharge&) = delete;
  ScopedCharge& operator=(const ScopedCharge&) = delete;
  ~ScopedCharge() {
    if (budget_ != nullptr) budget_->release(tag_, nbytes_);
  }
  void keep() noexcept { budget_ = nullptr; }

 private:
  Budget* budget_;
  Tag tag_;
  std::size_t nbytes_;
};

/// Says, for as long as it lives, that the device and the ledger may differ: from before a charge
/// until the device holds the bytes, and from before the device lets go until they are released.
/// Who compares the two leaves such a moment out.
class InTransit {
 public:
  explicit InTransit(Budget& budget) : budget_(budget) {
    const std::lock_guard lock(budget_.mutex_);
    ++budget_.stats_.in_transit;
  }
  ~InTransit() {
    const std::lock_guard lock(budget_.mutex_);
    --budget_.stats_.in_transit;
  }
  InTransit(const InTransit&) = delete;
  InTransit& operator=(const InTransit&) = delete;

 private:
  Budget& budget_;
};

}  // namespace penstock
