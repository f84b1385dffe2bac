#include "streamer/timeline.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace penstock {

namespace {

constexpr std::size_t kMostPasses = 64;
constexpr std::size_t kMostSpans = std::size_t{1} << 18;
constexpr std::size_t kMostPending = 64;  // passes that the host is ahead of the device

}  // namespace

Timeline::Timeline(std::shared_ptr<Device> device) : device_(std::move(device)) {}

void Timeline::begin_pass(Event start) {
  current_ = Pass{};
  current_.start = std::move(start);
}

void Timeline::end_pass(Event end, const PassStats& totals) {
  if (!current_.start) return;
  current_.end = std::move(end);
  current_.totals = totals;
  pending_.push_back(std::exchange(current_, Pass{}));
  if (pending_.size() > kMostPending) pending_.pop_front();
}

void Timeline::add_wait(std::uint32_t step, std::size_t place, Event before, Event after) {
  if (current_.start) current_.waits.push_back({step, place, std::move(before), std::move(after)});
}

void Timeline::add_span(SpanKind kind, std::uint32_t id, std::uint32_t count, Event start,
                        Event end) {
  if (current_.start) current_.pairs.push_back({kind, id, count, std::move(start), std::move(end)});
}

double Timeline::elapsed(const Event& start, const Event& end) const {
  return device_->event_elapsed(start->get(), end->get());
}

bool Timeline::over(const Pass& pass) const {
  const auto done = [&](const Event& event) { return device_->event_done(event->get()); };
  // Loads for the next pass may end after the pass does, and so may steps on other streams.
  return done(pass.start) && done(pass.end) &&
         std::all_of(pass.waits.begin(), pass.waits.end(),
                     [&](const Wait& wait) { return done(wait.before) && done(wait.after); }) &&
         std::all_of(pass.pairs.begin(), pass.pairs.end(),
                     [&](const Pair& pair) { return done(pair.start) && done(pair.end); });
}

void Timeline::collect() {
  try {
    while (!pending_.empty() && over(pending_.front())) {
      const Pass pass = std::move(pending_.front());
      pending_.pop_front();
      collect(pass);
    }
  } catch (const std::exception& error) {
    device_->suppress(error.what());
  }
}

void Timeline::collect(const Pass& pass) {
  double start = 0;
  if (previous_start_) start = previous_start_time_ + elapsed(previous_start_, pass.start);
  previous_start_ = pass.start;
  previous_start_time_ = start;

  PassStats stats = pass.totals;
  stats.seconds = elapsed(pass.start, pass.end);
  const bool traced = !pass.pairs.empty();
  const auto keep = [&](SpanKind kind, std::uint32_t id, std::uint32_t count, const Event& from,
                        const Event& to) {
    spans_.push_back({kind, id, count, start + elapsed(pass.start, from), elapsed(from, to)});
    if (spans_.size() > kMostSpans) spans_.pop_front();
  };
  if (traced) {
    keep(SpanKind::kPass, 0, 0, pass.start, pass.end);
    step_seconds_.clear();
  }
  for (std::size_t i = 0; i < pass.waits.size(); ++i) {
    const Wait& wait = pass.waits[i];
    const double stall = elapsed(wait.before, wait.after);
    stats.stall_seconds += stall;
    if (stall > stats.longest_stall_seconds) {
      stats.longest_stall_seconds = stall;
      stats.longest_stall_step = wait.step;
    }
    if (!traced) continue;
    keep(SpanKind::kStall, wait.step, 0, wait.before, wait.after);
    const Event& next = i + 1 < pass.waits.size() ? pass.waits[i + 1].before : pass.end;
    if (step_seconds_.size() <= wait.place) step_seconds_.resize(wait.place + 1, 0);
    step_seconds_[wait.place] += elapsed(wait.after, next);
  }
  for (const Pair& pair : pass.pairs) keep(pair.kind, pair.id, pair.count, pair.start, pair.end);
  passes_.push_back(stats);
  if (passes_.size() > kMostPasses) passes_.pop_front();
}

}  // namespace penstock
