// Where a consumer of pages is in the order that it said it would follow, over and over, and so
// which page it needs next and how soon. It follows what is really fetched: a page that comes soon
// moves it there; one that comes much later may be an exception, and moves it only when the page
// behind that one is fetched next. Pure, not thread-safe.
#pragma once

#include <cstddef>
#include <vector>

#include "schedule/schedule.hpp"

namespace penstock {

class ReadOrder {
 public:
  /// @param window  Pages that count as soon.
  explicit ReadOrder(std::size_t window) : window_(window) {}

  /// Begins a new order. @throws std::out_of_range for a page of `page_count` or more.
  void set(std::size_t page_count, const std::vector<PageIndex>& order);
  void fetched(PageIndex page);

  StepTime now() const noexcept { return now_; }
  std::size_t size() const noexcept { return order_.step_count(); }
  PageIndex page_at(StepTime time) const {
    return order_.pages_of(static_cast<StepIndex>((time - 1) % size())).front();
  }
  /// When the page is fetched next; kNever for one that is not in the order.
  StepTime next_use(PageIndex page) const {
    return size() == 0 ? kNever : order_.next_use(page, now_);
  }

 private:
  std::size_t window_;
  Schedule order_;  // one page a step
  StepTime now_ = 0;
  StepTime elsewhere_ = kNever;  // of the exception that was fetched last
};

}  // namespace penstock
