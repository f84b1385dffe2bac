#include "outside/outside_estimate.hpp"

#include <algorithm>

namespace penstock {

std::optional<std::size_t> OutsideEstimate::outside_of(const BudgetStats& before,
                                                       std::size_t device,
                                                       const BudgetStats& after) {
  if (before.version != after.version || before.in_transit != 0 || after.in_transit != 0) {
    return std::nullopt;
  }
  const auto charged = after.used_by_tag[static_cast<std::size_t>(Tag::kOutside)];
  const std::size_t inside = after.used - charged;
  return device > inside ? device - inside : 0;
}

std::size_t OutsideEstimate::follow(std::size_t outside) {
  readings_[next_] = outside;
  next_ = (next_ + 1) % kReadings;
  return *std::max_element(readings_.begin(), readings_.end());
}

}  // namespace penstock
