// What a process holds on the device beyond what its ledger says, from readings of both: pure
// figures, without a device, a clock or a lock.
//
// A reading is the ledger, then the device, then the ledger again, and counts only if nothing was
// charged, released or in transit between: then the device holds all that the ledger says, and what
// it holds beyond that is outside. Else there is a least amount: nothing is held that was not
// charged, so what was charged before and between is as much as can be inside. The estimate is the
// largest of the last few readings, so that growth is followed at once, and shrinkage when it has
// lasted: a charge that is made real much later, as of managed memory, looks like shrinkage for a
// while. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <optional>

#include "budget/budget.hpp"

namespace penstock {

class OutsideEstimate {
 public:
  static constexpr std::size_t kReadings = 8;  ///< That are remembered.

  /// What a reading says, in bytes; none where the ledger was changing.
  /// @param device  What the process holds on the device.
  static std::optional<std::size_t> outside_of(const BudgetStats& before, std::size_t device,
                                               const BudgetStats& after);

  /// What is outside at least, in bytes, also where the ledger was changing.
  static std::size_t at_least(const BudgetStats& before, std::size_t device,
                              const BudgetStats& after);

  /// Takes a reading in. @return the estimate, in bytes.
  std::size_t follow(std::size_t outside);
  /// Takes a least amount in, where it is more than was known. @return the estimate, in bytes.
  std::size_t follow_growth(std::size_t least);

 private:
  std::size_t largest() const;

  std::array<std::size_t, kReadings> readings_{};
  std::size_t next_ = 0;
};

}  // namespace penstock
