#include "streamer/streamer.hpp"

#include <algorithm>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "device/ranges.hpp"
#include "error/error.hpp"

namespace penstock {

Streamer::Streamer(std::shared_ptr<Region> region)
    : region_(std::move(region)),
      events_(region_->device_pointer(), Timing::kOn),
      timeline_(region_->device_pointer()) {
  region_->set_observer(this);
}

Streamer::~Streamer() {
  region_->drop_observer(this);
  for (; !open_.empty(); open_.pop_back()) {
    const Open& step = open_.back();
    end_range(step.range);
    try {
      region_->end(*step.pages, step.stream);
    } catch (const std::exception& error) {
      region_->device().suppress(error.what());
    }
  }
}

// ---- the order ---------------------------------------------------------------------------------

void Streamer::define(StepId id, std::vector<PageIndex> pages, std::string name) {
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  if (!pages.empty() && pages.back() >= region_->page_count()) {
    throw std::out_of_range("step " + std::to_string(id) + " reads page " +
                            std::to_string(pages.back()) + " of a region of " +
                            std::to_string(region_->page_count()) + " pages");
  }
  const std::lock_guard lock(mutex_);
  if (id >= steps_.size()) {
    steps_.resize(std::size_t{id} + 1);
    names_.resize(std::size_t{id} + 1);
  }
  names_[id] = std::move(name);
  steps_[id] = std::make_shared<const Pages>(std::move(pages));
}

void Streamer::follow(std::vector<StepId> order, std::vector<std::vector<PageIndex>> pages) {
  if (order.size() != pages.size()) {
    throw std::invalid_argument("follow: " + std::to_string(order.size()) + " steps, pages for " +
                                std::to_string(pages.size()));
  }
  Upcoming upcoming;
  for (std::size_t i = 0; i < order.size(); ++i) {
    upcoming.places[order[i]].push_back(static_cast<StepIndex>(i));
  }
  upcoming.order = std::move(order);
  upcoming.pages = std::move(pages);
  const std::lock_guard lock(mutex_);
  region_->set_schedule(upcoming.pages);
  upcoming_ = std::move(upcoming);
  now_ = 0;
  skip_to(1);
}

void Streamer::skip_to(StepTime time) {
  cursor_ = {time, 0};
  ahead_.clear();
  pages_ahead_ = 0;
  blocked_ = false;
}

void Streamer::count_ahead(StepTime time) {
  if (ahead_.size() < time - now_) ahead_.resize(time - now_);
  ++ahead_[time - now_ - 1];
  ++pages_ahead_;
}

void Streamer::move_to(StepId id) {
  const std::size_t expected = upcoming_.order.empty() ? 0 : now_ % upcoming_.order.size();
  if (!upcoming_.order.empty() && upcoming_.order[expected] == id) {
    region_->advance(static_cast<StepIndex>(expected));
    come_to(now_ + 1);
    return;
  }
  const auto found = upcoming_.places.find(id);
  if (found == upcoming_.places.end()) {
    ++unscheduled_;
    return;
  }
  const std::size_t count = upcoming_.order.size();
  const auto& places = found->second;
  const auto here = static_cast<StepIndex>(now_ % count);  // the place that time now_ + 1 has
  const auto next = std::lower_bound(places.begin(), places.end(), here);
  const bool wraps = next == places.end();
  const StepIndex place = wraps ? places.front() : *next;
  const StepTime time = (now_ / count + (wraps ? 1 : 0)) * count + place + 1;
  region_->advance(place);
  come_to(time);
}

void Streamer::come_to(StepTime time) {
  if (cursor_.time <= time) {
    skip_to(time + 1);
  } else {
    for (StepTime passed = now_ + 1; passed <= time && !ahead_.empty(); ++passed) {
      pages_ahead_ -= ahead_.front();
      ahead_.pop_front();
    }
  }
  now_ = time;
}

void Streamer::load_ahead(bool whole_pass) noexcept {
  try {
    move_cursor(whole_pass);
  } catch (const std::exception& error) {
    region_->device().suppress(error.what());
  }
}

void Streamer::move_cursor(bool whole_pass) {
  freed_ = 0;
  {
    const std::lock_guard lock(observed_mutex_);
    if (std::exchange(demanded_, false)) skip_to(now_ + 1);  // it may have taken what was ahead
  }
  const std::size_t count = upcoming_.order.size();
  if (count == 0) return;
  const StepTime pass_end = (now_ == 0 ? 1 : (now_ - 1) / count + 1) * count;
  const StepTime ahead = std::max<StepTime>(now_ + count - (whole_pass ? 0 : 1), count);
  const StepTime last = capturing_ ? pass_end : ahead;
  const std::size_t window = region_->ahead_window();
  if (pages_ahead_ >= window) return;
  const std::vector<bool> staying = region_->staying();
  const std::size_t most = region_->ahead_batch();
  while (cursor_.time <= last && pages_ahead_ < window) {
    const Batch batch = batch_at_cursor(last, most, staying);
    const std::size_t taken = batch.pages.empty() ? 0 : region_->load_ahead(batch.pages);
    for (std::size_t i = 0; i < taken; ++i) count_ahead(batch.places[i].time);
    if (taken < batch.pages.size()) {  // as far as it came
      cursor_ = batch.places[taken];
      blocked_ = true;
      return;
    }
    cursor_ = batch.end;
  }
}

Streamer::Batch Streamer::batch_at_cursor(StepTime last, std::size_t most,
                                          const std::vector<bool>& staying) const {
  // Where pages stay, a load ends before them: a little more, or as little as half, is one range.
  const bool in_runs = !staying.empty();
  const std::size_t limit = in_runs ? most + most / 8 : most;
  Batch batch;
  for (Place at = cursor_; at.time <= last; at = {at.time + 1, 0}) {
    const auto& pages = upcoming_.pages[(at.time - 1) % upcoming_.order.size()];
    for (; at.page < pages.size(); ++at.page) {
      const PageIndex page = pages[at.page];
      if (in_runs && staying[page]) continue;
      const std::size_t found = batch.pages.size();
      const bool apart = found > 0 && page != batch.pages.back() && page != batch.pages.back() + 1;
      if (found >= limit || (in_runs && apart && 2 * found >= most)) {
        batch.end = at;
        return batch;
      }
      batch.pages.push_back(page);
      batch.places.push_back(at);
    }
  }
  batch.end = {last + 1, 0};
  return batch;
}

void Streamer::prefetch() {
  const std::lock_guard lock(mutex_);
  skip_to(now_ + 1);  // others may have taken what was loaded before
  load_ahead(true);
}

// ---- running -----------------------------------------------------------------------------------

void Streamer::begin_pass(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  if (const std::size_t count = upcoming_.order.size(); count > 0 && now_ % count != 0) {
    // The pass before ended early: go on at the beginning of the next.
    region_->advance(static_cast<StepIndex>(count - 1));
    come_to((now_ / count + 1) * count);
  }
  const std::lock_guard observed(observed_mutex_);
  if (!capturing_) timeline_.begin_pass(events_.record(stream));
  pass_begin_ = {0, 0, 0, 0, loaded_bytes_, misses_, unscheduled_};
}

void Streamer::end_pass(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  ++passes_;
  if (capturing_) return;
  load_ahead();
  const std::lock_guard observed(observed_mutex_);
  PassStats totals;
  totals.loaded_bytes = loaded_bytes_ - pass_begin_.loaded_bytes;
  totals.misses = misses_ - pass_begin_.misses;
  totals.unscheduled = unscheduled_ - pass_begin_.unscheduled;
  timeline_.collect();  // here, since the host is ahead: at the beginning it would be waited for
  timeline_.end_pass(events_.record(stream), totals);
}

Event Streamer::note_time(StreamHandle stream) noexcept {
  try {
    return events_.record(stream);
  } catch (const std::exception& error) {  // a step is not worth less for want of a figure
    region_->device().suppress(error.what());
    return nullptr;
  }
}

void Streamer::begin(StepId id, StepId at, StreamHandle stream) {
  std::shared_ptr<const Pages> pages;
  std::uint64_t range = 0;
  std::size_t place = 0;
  bool timed = false;
  {
    const std::lock_guard lock(mutex_);
    if (id >= steps_.size() || !steps_[id]) {
      throw ScheduleError("begin: step " + std::to_string(id) + " was not defined");
    }
    pages = steps_[id];
    if (capturing_) load_ahead();  // as late as can be: then most can be in one copy
    move_to(at);
    ++steps_run_;
    const std::size_t count = upcoming_.order.size();
    place = count > 0 && now_ > 0 ? (now_ - 1) % count : 0;
    timed = !capturing_ && (tracing_ || !region_->settled(*pages, stream));
    range = start_range(names_[id].c_str());
  }
  const Event before = timed ? note_time(stream) : nullptr;
  bool gives_way = false;
  try {
    gives_way = region_->begin(*pages, stream);
  } catch (...) {
    end_range(range);
    throw;
  }
  const Event after = before ? note_time(stream) : nullptr;
  const std::lock_guard lock(mutex_);
  open_.push_back({id, stream, pages, std::this_thread::get_id(), nullptr, range, gives_way});
  if (after) {
    const std::lock_guard observed(observed_mutex_);
    timeline_.add_wait(id, place, before, after);
    if (tracing_) open_.back().since = after;
  }
  if (!capturing_ && (gives_way ? is_worth_loading() : cursor_is_near())) load_ahead();
}

bool Streamer::cursor_is_near() const {
  return !blocked_ && cursor_.time <= now_ + upcoming_.order.size() / 2;
}

bool Streamer::is_worth_loading() const {
  return !blocked_ || cursor_.time <= now_ + 1 || freed_ >= region_->least_load();
}

void Streamer::end(StepId id, StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  const auto found = std::find_if(open_.rbegin(), open_.rend(), [&](const Open& open) {
    return open.id == id && open.thread == std::this_thread::get_id();
  });
  if (found == open_.rend()) {
    throw ScheduleError("end: step " + std::to_string(id) + " was not begun");
  }
  const Open step = std::move(*found);
  open_.erase(std::next(found).base());
  end_range(step.range);
  if (const Event after = step.since ? note_time(stream) : nullptr) {
    const std::lock_guard observed(observed_mutex_);
    timeline_.add_span(SpanKind::kStep, id, 0, step.since, after);
  }
  region_->end(*step.pages, stream);
  if (capturing_ || !step.gives_way) return;
  freed_ += step.pages->size();
  if (is_worth_loading()) load_ahead();
}

void Streamer::set_capturing(bool capturing) {
  const std::lock_guard lock(mutex_);
  capturing_ = capturing;
  if (const std::size_t count = upcoming_.order.size(); count > 0) {
    region_->set_schedule(upcoming_.pages);
    now_ = 0;
  }
  skip_to(now_ + 1);
}

void Streamer::set_trace(bool trace) {
  const std::lock_guard lock(mutex_);
  tracing_ = trace;
  region_->set_trace(trace);
  for (Open& step : open_) step.since.reset();
}

// ---- figures -----------------------------------------------------------------------------------

void Streamer::on_load(PageIndex first, std::size_t count, std::size_t nbytes, const Event& start,
                       const Event& ready, bool demanded) {
  const std::lock_guard lock(observed_mutex_);
  loaded_bytes_ += nbytes;
  if (demanded) {
    ++misses_;
    demanded_ = true;
  }
  if (start) {
    timeline_.add_span(SpanKind::kLoad, first, static_cast<std::uint32_t>(count), start, ready);
  }
}

void Streamer::on_evict(PageIndex first, std::size_t count, const Event& start, const Event& end) {
  const std::lock_guard lock(observed_mutex_);
  timeline_.add_span(SpanKind::kEvict, first, static_cast<std::uint32_t>(count), start, end);
}

StreamerStats Streamer::stats() const {
  const std::lock_guard lock(mutex_);
  const std::lock_guard observed(observed_mutex_);
  return {passes_, steps_run_, unscheduled_, misses_, loaded_bytes_};
}

std::vector<PassStats> Streamer::passes() {
  const std::lock_guard observed(observed_mutex_);
  timeline_.collect();
  return {timeline_.passes().begin(), timeline_.passes().end()};
}

std::vector<Span> Streamer::timeline() {
  const std::lock_guard observed(observed_mutex_);
  timeline_.collect();
  return {timeline_.spans().begin(), timeline_.spans().end()};
}

std::vector<double> Streamer::step_seconds() {
  const std::lock_guard observed(observed_mutex_);
  timeline_.collect();
  return timeline_.step_seconds();
}

}  // namespace penstock
