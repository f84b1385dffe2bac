#include "planner/resident_set.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>

namespace penstock {

namespace {

using Pages = std::vector<PageIndex>;

// Some of the groups that have `count` pages together: of the largest ones, as many as are needed,
// at even distances. All of them where they have fewer pages.
std::vector<Pages> choose_evenly(std::vector<Pages> groups, std::size_t count) {
  const auto pages_in = [](const std::vector<Pages>& some) {
    return std::accumulate(some.begin(), some.end(), std::size_t{0},
                           [](std::size_t sum, const Pages& group) { return sum + group.size(); });
  };
  std::vector<std::size_t> sizes;
  for (const Pages& group : groups) sizes.push_back(group.size());
  std::sort(sizes.rbegin(), sizes.rend());
  std::size_t pages = 0;
  std::size_t least = 0;
  for (const std::size_t size : sizes) {
    if (pages >= count) break;
    pages += size;
    least = size;
  }
  groups.erase(std::remove_if(groups.begin(), groups.end(),
                              [&](const Pages& group) { return group.size() < least; }),
               groups.end());
  const std::size_t all = pages_in(groups);
  if (all <= count) return groups;
  for (std::size_t wanted = count * groups.size() / all; wanted < groups.size(); ++wanted) {
    std::vector<Pages> chosen = spread(groups, wanted);
    if (pages_in(chosen) >= count) return chosen;
  }
  return groups;
}

class Chooser {
 public:
  Chooser(const Reads& reads, const std::vector<bool>& forced, const ResidentQuery& query)
      : reads_(reads), query_(query), resident_(forced) {
    const auto taken = static_cast<std::size_t>(std::count(forced.begin(), forced.end(), true));
    left_ = query.count - std::min(taken, query.count);
    count_loads();
  }

  bool make_steps_fit();
  void take_repeated() { take_by_loads(streamed(), 2); }
  void take_spread_by_time();
  void take_spread_by_pages() { take_by_loads(streamed(), 1); }
  void take_spread_by_steps();

  const std::vector<bool>& resident() const noexcept { return resident_; }

 private:
  void count_loads();
  void take(const std::vector<PageIndex>& pages);
  void take_by_loads(const std::vector<PageIndex>& pages, std::size_t least_loads);
  void take_shared_first(std::vector<PageIndex> pages);
  std::vector<PageIndex> streamed() const;
  std::vector<std::size_t> share_by_time(const std::vector<std::size_t>& most,
                                         std::size_t count) const;

  const Reads& reads_;
  const ResidentQuery& query_;
  std::vector<bool> resident_;
  std::vector<std::size_t> loads_;  // by page: about how often a pass would load it, if streamed
  std::size_t left_ = 0;            // pages that may still be taken
};

// A page is loaded anew after a gap in which the whole ring is filled with others. Of the pages
// that are read in the gap, only some stream; how many is known only afterwards, so the share of
// the whole pass stands for it.
void Chooser::count_loads() {
  loads_.assign(reads_.page_count(), 0);
  const auto all = static_cast<double>(reads_.order.size());
  const double share = std::max(0.0, all - static_cast<double>(query_.count)) / std::max(all, 1.0);
  for (const PageIndex page : reads_.order) {
    const auto& steps = reads_.steps_of[page];
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const bool wraps = i + 1 == steps.size();
      const StepIndex next = wraps ? steps.front() : steps[i + 1];
      const std::size_t gap = reads_.reads_before[next] - reads_.reads_before[steps[i]] +
                              (wraps ? reads_.read_count() : 0) - 1;
      if (share * static_cast<double>(gap) >= static_cast<double>(query_.ring)) ++loads_[page];
    }
    loads_[page] = std::max<std::size_t>(loads_[page], 1);
  }
}

std::vector<PageIndex> Chooser::streamed() const {
  std::vector<PageIndex> pages;
  std::copy_if(reads_.order.begin(), reads_.order.end(), std::back_inserter(pages),
               [&](PageIndex page) { return !resident_[page] && !reads_.streamed[page]; });
  return pages;
}

void Chooser::take(const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) resident_[page] = true;
  left_ -= pages.size();
}

// Those with the most loads first; of those that do not all fit, some at even distances.
void Chooser::take_by_loads(const std::vector<PageIndex>& pages, std::size_t least_loads) {
  std::vector<std::size_t> levels;
  for (const PageIndex page : pages) levels.push_back(loads_[page]);
  std::sort(levels.rbegin(), levels.rend());
  levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
  for (const std::size_t level : levels) {
    if (left_ == 0 || level < least_loads) return;
    std::vector<PageIndex> equal;
    std::copy_if(pages.begin(), pages.end(), std::back_inserter(equal),
                 [&](PageIndex page) { return loads_[page] == level; });
    take(spread(equal, std::min(left_, equal.size())));
  }
}

// Those first that other steps read too, so that what is left is of this step and lies together.
void Chooser::take_shared_first(std::vector<PageIndex> pages) {
  std::stable_partition(pages.begin(), pages.end(),
                        [&](PageIndex page) { return reads_.steps_of[page].size() > 1; });
  pages.resize(left_);
  take(pages);
}

bool Chooser::make_steps_fit() {
  std::vector<StepIndex> steps(reads_.step_count());
  std::iota(steps.begin(), steps.end(), StepIndex{0});
  std::stable_sort(steps.begin(), steps.end(), [&](StepIndex a, StepIndex b) {
    return reads_.pages_of[a].size() > reads_.pages_of[b].size();
  });
  for (const StepIndex step : steps) {
    std::vector<PageIndex> pages;
    std::size_t forced = 0;  // to stream
    for (const PageIndex page : reads_.pages_of[step]) {
      if (reads_.streamed[page]) {
        ++forced;
      } else if (!resident_[page]) {
        pages.push_back(page);
      }
    }
    if (pages.size() + forced <= query_.largest_step) continue;
    const std::size_t excess = pages.size() + forced - query_.largest_step;
    if (excess > std::min(left_, pages.size())) return false;
    const std::size_t rest = left_ - excess;
    left_ = excess;
    if (query_.spread_by == SpreadBy::kSteps) {
      take_shared_first(pages);
    } else {
      take_by_loads(pages, 1);
    }
    left_ = rest;
  }
  return true;
}

// How many pages each step may stream, `count` in all, so that at every place of the pass what has
// streamed keeps in proportion to the time that has passed.
std::vector<std::size_t> Chooser::share_by_time(const std::vector<std::size_t>& most,
                                                std::size_t count) const {
  const double total = std::accumulate(query_.step_seconds.begin(), query_.step_seconds.end(), 0.0);
  std::vector<std::size_t> shares(most.size(), 0);
  std::size_t left = count;
  double due = 0;
  // What steps with few pages leave over goes to the steps after them, through the pass's end.
  for (int lap = 0; lap < 2; ++lap) {
    for (std::size_t step = 0; step < most.size(); ++step) {
      constexpr double kRounding = 1e-6;
      if (lap == 0) due += static_cast<double>(count) * query_.step_seconds[step] / total;
      const std::size_t room = std::min(most[step] - shares[step], left);
      const std::size_t share = std::min(room, static_cast<std::size_t>(due + kRounding));
      shares[step] += share;
      left -= share;
      due -= static_cast<double>(share);
    }
  }
  for (std::size_t step = 0; step < most.size() && left > 0; ++step) {
    const std::size_t share = std::min(most[step] - shares[step], left);
    shares[step] += share;
    left -= share;
  }
  return shares;
}

void Chooser::take_spread_by_time() {
  std::vector<std::vector<PageIndex>> pages(reads_.step_count());
  std::size_t count = 0;
  for (const PageIndex page : streamed()) {
    pages[reads_.steps_of[page].front()].push_back(page);
    ++count;
  }
  std::vector<std::size_t> most;
  for (const auto& each : pages) most.push_back(each.size());
  const auto shares = share_by_time(most, count - std::min(left_, count));
  for (std::size_t step = 0; step < pages.size(); ++step) {
    take(spread(pages[step], most[step] - shares[step]));
  }
}

// What streams is of steps at even distances, those that have many pages of their own, and all of
// these. Where such steps do not have enough, pages of several steps stream, too.
void Chooser::take_spread_by_steps() {
  const Pages pages = streamed();
  std::vector<Pages> own(reads_.step_count());
  for (const PageIndex page : pages) {
    const auto& steps = reads_.steps_of[page];
    if (steps.size() == 1) own[steps.front()].push_back(page);
  }
  own.erase(std::remove_if(own.begin(), own.end(), [](const Pages& each) { return each.empty(); }),
            own.end());
  std::size_t count = pages.size() - std::min(left_, pages.size());  // to stream
  std::vector<bool> streams(reads_.page_count(), false);
  for (const Pages& chosen : choose_evenly(std::move(own), count)) {
    for (const PageIndex page : chosen) {
      if (count == 0) break;
      streams[page] = true;
      --count;
    }
  }
  Pages others;
  std::copy_if(pages.begin(), pages.end(), std::back_inserter(others),
               [&](PageIndex page) { return !streams[page]; });
  take_by_loads(others, 1);
}

}  // namespace

std::optional<std::vector<bool>> choose_resident(const Reads& reads,
                                                 const std::vector<bool>& forced,
                                                 const ResidentQuery& query) {
  Chooser chooser(reads, forced, query);
  if (!chooser.make_steps_fit()) return std::nullopt;
  chooser.take_repeated();
  switch (query.spread_by) {
    case SpreadBy::kPages:
      chooser.take_spread_by_pages();
      break;
    case SpreadBy::kTime:
      chooser.take_spread_by_time();
      break;
    case SpreadBy::kSteps:
      chooser.take_spread_by_steps();
      break;
  }
  return chooser.resident();
}

}  // namespace penstock
