#include "planner/ring.hpp"

#include <algorithm>

#include "planner/resident_set.hpp"

namespace penstock {

namespace {

// The frames of the ring, the one that was read the longest ago first.
class Turns {
 public:
  explicit Turns(std::size_t frames) : next_(frames + 1), previous_(frames + 1) {
    for (std::size_t i = 0; i <= frames; ++i) {
      next_[i] = i == frames ? 0 : i + 1;
      previous_[i] = i == 0 ? frames : i - 1;
    }
  }

  std::size_t oldest() const { return next_[end()]; }
  std::size_t after(std::size_t slot) const { return next_[slot]; }
  std::size_t end() const { return next_.size() - 1; }

  void read(std::size_t slot) {
    next_[previous_[slot]] = next_[slot];
    previous_[next_[slot]] = previous_[slot];
    previous_[slot] = previous_[end()];
    next_[slot] = end();
    next_[previous_[slot]] = slot;
    previous_[end()] = slot;
  }

 private:
  std::vector<std::size_t> next_;
  std::vector<std::size_t> previous_;
};

// Which frames each step uses.
class Places {
 public:
  Places(const Reads& reads, std::size_t frames)
      : reads_(reads), frames_(frames), taken_(reads.step_count() * frames, false) {}

  bool free(PageIndex page, std::size_t slot) const {
    const auto& steps = reads_.steps_of[page];
    return std::none_of(steps.begin(), steps.end(),
                        [&](StepIndex step) { return taken_[step * frames_ + slot]; });
  }

  void take(PageIndex page, std::size_t slot) {
    for (const StepIndex step : reads_.steps_of[page]) taken_[step * frames_ + slot] = true;
  }

 private:
  const Reads& reads_;
  const std::size_t frames_;
  std::vector<bool> taken_;
};

}  // namespace

Ring assign_ring(const Reads& reads, const std::vector<bool>& resident, std::size_t frames) {
  Ring ring{std::vector<SlotIndex>(reads.page_count(), kResident), frames, {}};
  const auto streamed = static_cast<std::size_t>(std::count_if(
      reads.order.begin(), reads.order.end(), [&](PageIndex page) { return !resident[page]; }));
  if (streamed == 0) return ring;
  const std::size_t rounds = (streamed + frames - 1) / frames;
  const std::size_t left_out = rounds * frames - streamed;
  Turns turns(frames);
  Places places(reads, frames);
  std::size_t placed = 0;
  for (const auto& pages : reads.pages_of) {
    for (const PageIndex page : pages) {
      if (resident[page]) continue;
      if (ring.slot[page] != kResident) {
        turns.read(ring.slot[page]);
        continue;
      }
      std::size_t slot = turns.oldest();
      while (slot != turns.end() && !places.free(page, slot)) slot = turns.after(slot);
      if (slot == turns.end()) {
        ring.colliding.push_back(page);
        slot = turns.oldest();
      }
      ring.slot[page] = static_cast<SlotIndex>(slot);
      places.take(page, slot);
      turns.read(slot);
      const std::size_t due = (placed + 1) * left_out / streamed - placed * left_out / streamed;
      for (std::size_t i = 0; i < due; ++i) turns.read(turns.oldest());
      ++placed;
    }
  }
  return ring;
}

void drop_idle_frames(const Reads& reads, Ring& ring, std::vector<bool>& resident) {
  constexpr SlotIndex kDropped = kResident;
  std::vector<SlotIndex> renamed(ring.size, 0);
  std::vector<PageIndex> stayed;
  for (;;) {
    std::vector<std::size_t> users(ring.size, 0);
    std::vector<PageIndex> sharing;
    for (const PageIndex page : reads.order) {
      if (!resident[page]) ++users[ring.slot[page]];
    }
    std::size_t idle = 0;
    for (std::size_t slot = 0; slot < ring.size; ++slot) {
      if (users[slot] > 1 || renamed[slot] == kDropped) continue;
      renamed[slot] = kDropped;
      if (users[slot] == 0) ++idle;
    }
    const std::size_t before = stayed.size();
    for (const PageIndex page : reads.order) {
      if (resident[page]) continue;
      (renamed[ring.slot[page]] == kDropped ? stayed : sharing).push_back(page);
    }
    const auto may_not = [&](PageIndex page) { return reads.streamed[page]; };
    sharing.erase(std::remove_if(sharing.begin(), sharing.end(), may_not), sharing.end());
    const std::vector<PageIndex> gifts = spread(sharing, std::min(idle, sharing.size()));
    stayed.insert(stayed.end(), gifts.begin(), gifts.end());
    if (stayed.size() == before) break;
    for (std::size_t i = before; i < stayed.size(); ++i) resident[stayed[i]] = true;
  }
  for (const PageIndex page : stayed) ring.slot[page] = kResident;
  SlotIndex size = 0;
  for (SlotIndex& slot : renamed) {
    if (slot != kDropped) slot = size++;
  }
  for (SlotIndex& slot : ring.slot) {
    if (slot != kResident) slot = renamed[slot];
  }
  if (size == 0 && reads.order.size() < reads.page_count() && !stayed.empty()) {
    resident[stayed.back()] = false;
    ring.slot[stayed.back()] = 0;
    size = 1;
  }
  ring.size = size;
}

}  // namespace penstock
