#include "planner/draft.hpp"

#include <algorithm>
#include <utility>

#include "planner/ring.hpp"
#include "planner/simulation.hpp"

namespace penstock {

namespace {

constexpr int kMostRepairs = 8;

// A step that reads streamed pages takes the host about 40 us (hooks, events, a copy; on an H100's
// host), of which a pass that waits for copies shows nothing, and one that waits for the host all.
// A quarter stands for both; it decides between plans of nearly the same time.
constexpr double kHostSecondsPerStep = 10e-6;

}  // namespace

Draft Drafter::with_all_resident() const {
  return finish(std::vector<bool>(reads_.page_count(), true), {}, 0);
}

Draft Drafter::with_first_resident(std::size_t ring) const {
  std::vector<bool> resident = reads_.kept;
  std::size_t left = request_.frames - reads_.kept_count - ring;
  for (std::size_t page = 0; page < reads_.page_count() && left > 0; ++page) {
    if (resident[page] || reads_.streamed[page]) continue;
    resident[page] = true;
    --left;
  }
  return finish(resident, {}, ring);
}

Draft Drafter::with_all_read_resident() const {
  std::vector<bool> resident = reads_.kept;
  for (const PageIndex page : reads_.order) resident[page] = true;
  const auto count = static_cast<std::size_t>(std::count(resident.begin(), resident.end(), true));
  return finish(resident, {}, request_.frames - count);
}

// Pages for which the ring has no place stay instead, as far as the others leave them frames.
std::optional<Draft> Drafter::with_ring(const ResidentQuery& query) const {
  std::vector<bool> forced = reads_.kept;
  std::size_t forced_count = reads_.kept_count;
  for (int repair = 0;; ++repair) {
    auto resident = choose_resident(reads_, forced, query);
    if (!resident) return std::nullopt;
    Ring ring = assign_ring(reads_, *resident, query.ring);
    auto& colliding = ring.colliding;
    colliding.erase(std::remove_if(colliding.begin(), colliding.end(),
                                   [&](PageIndex page) { return reads_.streamed[page]; }),
                    colliding.end());
    const bool last = repair == kMostRepairs || forced_count + colliding.size() > query.count;
    if (colliding.empty() || last) {
      drop_idle_frames(reads_, ring, *resident);
      return finish(*resident, std::move(ring.slot), ring.size);
    }
    for (const PageIndex page : colliding) forced[page] = true;
    forced_count += colliding.size();
  }
}

Draft Drafter::finish(const std::vector<bool>& resident, std::vector<SlotIndex> slot,
                      std::size_t ring) const {
  Draft draft;
  Plan& plan = draft.plan;
  plan.ring = ring;
  plan.slot = std::move(slot);
  plan.slot.resize(reads_.page_count(), kResident);
  SlotIndex turn = 0;
  for (std::size_t i = 0; i < reads_.page_count(); ++i) {
    if (resident[i]) {
      plan.resident.push_back(static_cast<PageIndex>(i));
    } else if (plan.slot[i] == kResident) {  // read by no step
      plan.slot[i] = turn++ % static_cast<SlotIndex>(plan.ring);
    }
  }
  plan.loads = steady_loads(reads_, plan.slot, plan.ring);
  plan.bytes_per_pass = plan.loads.size() * request_.page_size;
  plan.seconds = pass_seconds(reads_, request_, plan);
  const std::size_t largest = largest_streamed(plan);
  draft.cost = plan.seconds + kHostSecondsPerStep * static_cast<double>(streaming_steps(plan));
  draft.room = plan.ring - std::min(plan.ring, largest);
  draft.collisions = collisions_of(plan);
  return draft;
}

std::size_t Drafter::largest_streamed(const Plan& plan) const {
  std::size_t largest = 0;
  for (const auto& pages : reads_.pages_of) {
    const auto streamed = std::count_if(
        pages.begin(), pages.end(), [&](PageIndex page) { return plan.slot[page] != kResident; });
    largest = std::max(largest, static_cast<std::size_t>(streamed));
  }
  return largest;
}

std::size_t Drafter::streaming_steps(const Plan& plan) const {
  const auto streams = [&](PageIndex page) { return plan.slot[page] != kResident; };
  return static_cast<std::size_t>(std::count_if(
      reads_.pages_of.begin(), reads_.pages_of.end(),
      [&](const auto& pages) { return std::any_of(pages.begin(), pages.end(), streams); }));
}

std::size_t Drafter::collisions_of(const Plan& plan) const {
  std::size_t collisions = 0;
  std::vector<std::size_t> last_step(plan.ring, 0);  // that used the slot, counted from 1
  for (std::size_t step = 0; step < reads_.step_count(); ++step) {
    for (const PageIndex page : reads_.pages_of[step]) {
      if (plan.slot[page] == kResident) continue;
      std::size_t& last = last_step[plan.slot[page]];
      if (last == step + 1) ++collisions;
      last = step + 1;
    }
  }
  return collisions;
}

}  // namespace penstock
