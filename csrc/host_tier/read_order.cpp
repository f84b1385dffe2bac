#include "host_tier/read_order.hpp"

namespace penstock {

void ReadOrder::set(std::size_t page_count, const std::vector<PageIndex>& order) {
  std::vector<std::vector<PageIndex>> steps;
  steps.reserve(order.size());
  for (const PageIndex page : order) steps.push_back({page});
  order_ = Schedule(page_count, std::move(steps));
  now_ = 0;
  elsewhere_ = kNever;
}

void ReadOrder::fetched(PageIndex page) {
  const StepTime next = next_use(page);
  if (next == kNever) return;
  if (next - now_ <= window_) {
    now_ = next;
    elsewhere_ = kNever;
  } else if (elsewhere_ != kNever && page_at(elsewhere_ + 1) == page) {
    now_ = elsewhere_ + 1;
    elsewhere_ = kNever;
  } else {
    elsewhere_ = next;
  }
}

}  // namespace penstock
