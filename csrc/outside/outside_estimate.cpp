#include "outside/outside_estimate.hpp"

#include <algorithm>

namespace penstock {

namespace {

std::size_t beyond(std::size_t device, std::uint64_t inside) {
  return device > inside ? static_cast<std::size_t>(device - inside) : 0;
}

std::size_t inside_of(const BudgetStats& ledger) {
  return ledger.used - ledger.used_by_tag[static_cast<std::size_t>(Tag::kOutside)];
}

}  // namespace

std::optional<std::size_t> OutsideEstimate::outside_of(const BudgetStats& before,
                                                       std::size_t device,
                                                       const BudgetStats& after) {
  if (before.version != after.version || before.in_transit != 0 || after.in_transit != 0) {
    return std::nullopt;
  }
  return beyond(device, inside_of(after));
}

std::size_t OutsideEstimate::at_least(const BudgetStats& before, std::size_t device,
                                      const BudgetStats& after) {
  return beyond(device, inside_of(before) + (after.charged - before.charged));
}

std::size_t OutsideEstimate::follow(std::size_t outside) {
  readings_[next_] = outside;
  next_ = (next_ + 1) % kReadings;
  return largest();
}

std::size_t OutsideEstimate::follow_growth(std::size_t least) {
  return least > largest() ? follow(least) : largest();
}

std::size_t OutsideEstimate::largest() const {
  return *std::max_element(readings_.begin(), readings_.end());
}

}  // namespace penstock
