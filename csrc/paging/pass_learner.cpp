#include "paging/pass_learner.hpp"

#include <algorithm>
#include <utility>

namespace penstock {

const std::vector<StepId>* PassLearner::known(StepId first) const {
  const auto found = kinds_.find(first);
  return found == kinds_.end() ? nullptr : &found->second.order;
}

bool PassLearner::learn(const std::vector<StepId>& pass) {
  if (pass.empty()) return false;
  const auto [found, is_new] = kinds_.try_emplace(pass.front());
  Kind& kind = found->second;
  const bool repeats = kind.last == pass;
  kind.last = pass;
  if (!is_new && pass == kind.order) {
    std::fill(kind.lacked.begin(), kind.lacked.end(), std::uint8_t{0});
    return false;
  }
  const auto take_whole = [&] {
    kind.order = pass;
    kind.lacked.assign(pass.size(), 0);
    return true;
  };
  if (is_new || repeats) return take_whole();
  const std::vector<std::size_t> common = common_places(kind.order, pass);
  const bool unlike = 2 * common.size() < kind.order.size();
  if (unlike && 2 * pass.size() >= kind.order.size()) return take_whole();  // another path
  std::vector<StepId> order;
  std::vector<std::uint8_t> lacked;
  for (std::size_t place = 0; place < kind.order.size(); ++place) {
    const bool lacks = !std::binary_search(common.begin(), common.end(), place);
    if (lacks && kind.lacked[place] != 0) continue;
    order.push_back(kind.order[place]);
    lacked.push_back(lacks ? 1 : 0);
  }
  const bool changed = order.size() != kind.order.size();
  kind.order = std::move(order);
  kind.lacked = std::move(lacked);
  return changed;
}

// J. W. Hunt and T. G. Szymanski, "A fast algorithm for computing longest common subsequences",
// 1977: a longest ascending run through the places of equal steps.
std::vector<std::size_t> common_places(const std::vector<StepId>& order,
                                       const std::vector<StepId>& pass) {
  constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  struct Match {
    std::size_t place;
    std::size_t before;  // index of a match; kNone for the first of a run
  };
  std::unordered_map<StepId, std::vector<std::size_t>> places;  // of each step, descending
  for (std::size_t place = order.size(); place-- > 0;) places[order[place]].push_back(place);
  std::vector<Match> matches;
  std::vector<std::size_t>
      ends;  // by length of a run: the match with the least place that ends one
  for (const StepId step : pass) {
    const auto found = places.find(step);
    if (found == places.end()) continue;
    for (const std::size_t place : found->second) {
      const auto end = std::lower_bound(
          ends.begin(), ends.end(), place,
          [&](std::size_t match, std::size_t at) { return matches[match].place < at; });
      const std::size_t before = end == ends.begin() ? kNone : *std::prev(end);
      if (end == ends.end()) {
        ends.push_back(matches.size());
      } else if (matches[*end].place == place) {
        continue;
      } else {
        *end = matches.size();
      }
      matches.push_back({place, before});
    }
  }
  std::vector<std::size_t> common;
  for (std::size_t at = ends.empty() ? kNone : ends.back(); at != kNone; at = matches[at].before) {
    common.push_back(matches[at].place);
  }
  std::reverse(common.begin(), common.end());
  return common;
}

}  // namespace penstock
