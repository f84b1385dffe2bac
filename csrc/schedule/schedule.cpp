#include "schedule/schedule.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace penstock {

Schedule::Schedule(std::size_t page_count, std::vector<std::vector<PageIndex>> steps)
    : steps_(std::move(steps)), uses_(page_count) {
  for (std::size_t step = 0; step < steps_.size(); ++step) {
    for (const PageIndex page : steps_[step]) {
      if (page >= page_count) throw std::out_of_range("schedule: no such page");
      auto& uses = uses_[page];
      const auto index = static_cast<StepIndex>(step);
      if (uses.empty() || uses.back() != index) uses.push_back(index);
    }
  }
}

// Time t (from 1) is step (t - 1) % step_count of pass (t - 1) / step_count.

StepTime Schedule::time_of(StepIndex step, StepTime now) const {
  if (step >= steps_.size()) throw std::out_of_range("schedule: no such step");
  const StepTime pass = now / steps_.size();
  const StepTime time = pass * steps_.size() + step + 1;
  return time > now ? time : time + steps_.size();
}

StepTime Schedule::next_use(PageIndex page, StepTime now) const {
  if (steps_.empty() || uses_[page].empty()) return kNever;
  const auto& uses = uses_[page];
  const auto place = static_cast<StepIndex>(now % steps_.size());  // the step that time now + 1 has
  const auto found = std::lower_bound(uses.begin(), uses.end(), place);
  return time_of(found != uses.end() ? *found : uses.front(), now);
}

}  // namespace penstock
