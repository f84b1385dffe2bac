// The timeline turns events into times. While a pass runs it collects pairs of events, on whichever
// streams; once the pass's last event is over it reads them and keeps figures of the pass, and, if
// they were traced, its spans, in bounded numbers. Times are seconds since the first pass began, by
// the device's clock. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "device/event_pool.hpp"
#include "schedule/schedule.hpp"

namespace penstock {

enum class SpanKind : std::uint8_t { kPass, kStep, kStall, kLoad, kEvict };

/// Something that took time. `id` is the step, or the first page.
struct Span {
  SpanKind kind;
  std::uint32_t id;
  std::uint32_t count;  ///< Pages, for loads and evictions.
  double start;         ///< Seconds.
  double seconds;
};

/// Figures of one pass.
struct PassStats {
  double seconds = 0;        ///< From its beginning to its end on the device.
  double stall_seconds = 0;  ///< In which steps waited for their pages.
  std::uint32_t longest_stall_step = 0;
  double longest_stall_seconds = 0;
  std::size_t loaded_bytes = 0;  ///< Whose loads were issued while it ran.
  std::uint64_t misses = 0;
  std::uint64_t unscheduled = 0;
};

class Timeline {
 public:
  explicit Timeline(std::shared_ptr<Device> device);

  void begin_pass(Event start);
  /// @param totals  Figures that events do not tell: bytes, misses, unscheduled steps.
  void end_pass(Event end, const PassStats& totals);

  /// A step, at a place of the order, waited from `before` to `after`.
  void add_wait(std::uint32_t step, std::size_t place, Event before, Event after);
  void add_span(SpanKind kind, std::uint32_t id, std::uint32_t count, Event start, Event end);

  /// Reads what is over, as far as it is. A pass whose times cannot be read is left out, and the
  /// failure noted with the device.
  void collect();
  const std::deque<PassStats>& passes() const noexcept { return passes_; }
  const std::deque<Span>& spans() const noexcept { return spans_; }
  /// Seconds from the end of each wait to the beginning of the next one, in the last pass that was
  /// collected, by place.
  const std::vector<double>& step_seconds() const noexcept { return step_seconds_; }

 private:
  struct Wait {
    std::uint32_t step;
    std::size_t place;
    Event before;
    Event after;
  };
  struct Pair {
    SpanKind kind;
    std::uint32_t id;
    std::uint32_t count;
    Event start;
    Event end;
  };
  struct Pass {
    Event start;
    Event end;
    PassStats totals;
    std::vector<Wait> waits;
    std::vector<Pair> pairs;
  };

  void collect(const Pass& pass);
  double elapsed(const Event& start, const Event& end) const;
  bool over(const Pass& pass) const;

  std::shared_ptr<Device> device_;
  Pass current_;
  std::deque<Pass> pending_;
  Event previous_start_;
  double previous_start_time_ = 0;
  std::deque<PassStats> passes_;
  std::deque<Span> spans_;
  std::vector<double> step_seconds_;
};

}  // namespace penstock
