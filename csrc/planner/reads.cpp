#include "planner/reads.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace penstock {

namespace {

void check(const PlanRequest& request) {
  if (request.page_size == 0) throw std::invalid_argument("plan: page_size is 0");
  if (!(request.link_rate > 0)) throw std::invalid_argument("plan: link_rate is not above 0");
  if (!request.step_seconds.empty() && request.step_seconds.size() != request.steps.size()) {
    throw std::invalid_argument("plan: " + std::to_string(request.step_seconds.size()) +
                                " step_seconds for " + std::to_string(request.steps.size()) +
                                " steps");
  }
  for (const double seconds : request.step_seconds) {
    if (!std::isfinite(seconds) || seconds < 0) {
      throw std::invalid_argument("plan: a step's time is below 0 or no number");
    }
  }
}

void check_page(PageIndex page, std::size_t page_count) {
  if (page < page_count) return;
  throw std::invalid_argument("plan: no page " + std::to_string(page) + " among " +
                              std::to_string(page_count));
}

}  // namespace

Reads::Reads(const PlanRequest& request)
    : pages_of(request.steps.size()),
      steps_of(request.page_count),
      reads_before(1, 0),
      kept(request.page_count, false),
      streamed(request.page_count, false) {
  check(request);
  for (const PageIndex page : request.keep) {
    check_page(page, request.page_count);
    if (!kept[page]) ++kept_count;
    kept[page] = true;
  }
  for (const PageIndex page : request.stream) {
    check_page(page, request.page_count);
    if (kept[page] || streamed[page]) continue;
    streamed[page] = true;
    ++streamed_count;
  }
  for (std::size_t i = 0; i < request.steps.size(); ++i) {
    const auto step = static_cast<StepIndex>(i);
    std::size_t moving = 0;
    for (const PageIndex page : request.steps[i]) {
      check_page(page, request.page_count);
      auto& steps = steps_of[page];
      if (!steps.empty() && steps.back() == step) continue;
      if (steps.empty()) order.push_back(page);
      steps.push_back(step);
      pages_of[i].push_back(page);
      if (!kept[page]) ++moving;
    }
    largest_step = std::max(largest_step, moving);
    reads_before.push_back(reads_before.back() + pages_of[i].size());
  }
}

std::size_t Reads::least_frames() const noexcept {
  const std::size_t moving = kept_count < page_count() ? 1 : 0;
  return kept_count + std::max(largest_step, moving);
}

}  // namespace penstock
