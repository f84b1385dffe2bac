// The learner finds out in which order the steps of a pass come, from passes that have ended.
// Passes that begin with the same step are of one kind: they have one order between them, which is
// what is expected of the next pass of that kind.
//
// The first pass of a kind is its order. What comes twice in a row is it from then on. Else the
// order loses what two passes in a row have lacked, and keeps the rest: of a model whose passes all
// differ (experts, branches), the steps that they share. One pass that was cut short changes
// nothing. Pure; not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "streamer/streamer.hpp"

namespace penstock {

class PassLearner {
 public:
  /// What is expected of a pass that begins with `first`; null if there was none.
  const std::vector<StepId>* known(StepId first) const;

  /// Learns from a pass that has ended; its first step tells its kind.
  /// @return whether what is expected of such passes has changed.
  bool learn(const std::vector<StepId>& pass);

 private:
  struct Kind {
    std::vector<StepId> order;
    std::vector<std::uint8_t> lacked;  // by place of the order: whether the last pass lacked it
    std::vector<StepId> last;          // pass
  };

  std::unordered_map<StepId, Kind> kinds_;  // by first step
};

/// The places in `order` of a longest common subsequence of it and `pass`, ascending.
std::vector<std::size_t> common_places(const std::vector<StepId>& order,
                                       const std::vector<StepId>& pass);

}  // namespace penstock
