#include "planner/simulation.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace penstock {

namespace {

constexpr int kMostPasses = 24;
constexpr double kSteady = 1e-7;  // relative change between passes that counts as none

class Clock {
 public:
  Clock(const Reads& reads, const PlanRequest& request, const Plan& plan)
      : reads_(reads),
        plan_(plan),
        step_seconds_(request.step_seconds),
        copy_seconds_(static_cast<double>(request.page_size) / request.link_rate + kSecondsPerCopy),
        ready_(reads.page_count(), 0),
        read_until_(plan.ring, 0) {}

  /// Runs one pass more. @return When its last step ends.
  double run_pass() {
    auto load = plan_.loads.begin();
    for (std::size_t step = 0; step < reads_.step_count(); ++step) {
      for (; load != plan_.loads.end() && load->step == step; ++load) copy(load->page);
      run_step(step);
    }
    return step_end_;
  }

 private:
  // The steps before the one that needs the page are all simulated by now, so the last reader of
  // its frame is known.
  void copy(PageIndex page) {
    const double reader_end = read_until_[plan_.slot[page]];
    const double wait = reader_end > copy_end_ ? kSecondsPerWait : 0;
    copy_end_ = std::max(copy_end_, reader_end + wait) + copy_seconds_;
    ready_[page] = copy_end_;
  }

  void run_step(std::size_t step) {
    for (const PageIndex page : reads_.pages_of[step]) {
      step_end_ = std::max(step_end_, ready_[page]);
    }
    if (!step_seconds_.empty()) step_end_ += step_seconds_[step];
    for (const PageIndex page : reads_.pages_of[step]) {
      if (plan_.slot[page] != kResident) read_until_[plan_.slot[page]] = step_end_;
    }
  }

  const Reads& reads_;
  const Plan& plan_;
  const std::vector<double>& step_seconds_;
  const double copy_seconds_;
  std::vector<double> ready_;       // by page: when its bytes are in place
  std::vector<double> read_until_;  // by slot: when the last step that read it ended
  double copy_end_ = 0;
  double step_end_ = 0;
};

}  // namespace

std::vector<Load> steady_loads(const Reads& reads, const std::vector<SlotIndex>& slot,
                               std::size_t ring) {
  std::vector<PageIndex> owner(ring, static_cast<PageIndex>(reads.page_count()));
  std::vector<Load> loads;
  for (int pass = 0; pass < 2; ++pass) {
    loads.clear();  // those of the first pass fill the ring
    for (std::size_t step = 0; step < reads.step_count(); ++step) {
      for (const PageIndex page : reads.pages_of[step]) {
        if (slot[page] == kResident || owner[slot[page]] == page) continue;
        owner[slot[page]] = page;
        loads.push_back({page, static_cast<StepIndex>(step)});
      }
    }
  }
  return loads;
}

double pass_seconds(const Reads& reads, const PlanRequest& request, const Plan& plan) {
  const double copies = static_cast<double>(plan.loads.size()) *
                        (static_cast<double>(request.page_size) / request.link_rate);
  const double compute =
      std::accumulate(request.step_seconds.begin(), request.step_seconds.end(), 0.0);
  if (plan.loads.empty()) return compute;
  Clock clock(reads, request, plan);
  double end = clock.run_pass();
  double seconds = end;
  for (int pass = 1; pass < kMostPasses; ++pass) {
    const double next = clock.run_pass();
    const double before = seconds;
    seconds = next - end;
    end = next;
    if (pass > 1 && std::abs(seconds - before) <= kSteady * before) break;
  }
  // A pass that lives on what was copied ahead before it is no steady state.
  return std::max({seconds, copies, compute});
}

}  // namespace penstock
