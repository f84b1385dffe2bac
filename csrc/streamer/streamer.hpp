// The streamer runs one model through its region: it knows the order of the steps, makes the pages
// of each ready when it begins, and keeps the link busy with the pages of the steps to come. It
// works the same over both kinds of regions.
//
// Words: a step is a piece of work with the pages that it reads, known by its id; an order is the
// sequence of steps of one pass, over and over. For each place in an order, the schedule has all
// pages that are in use there: the step's own, and those of steps around it that have not ended.
//
// Loading ahead: a cursor walks through the schedule, at most one pass ahead of the step that runs,
// and has the region load what is not in place, until the region has no room for the next page.
// Called again whenever a step ends that others may take the room of, that is all there is to
// look-ahead, wrapping around into the next pass, and prefetching in the order of use. Steps that
// are skipped, repeated or new move the position, or do not; their pages are demanded then, and the
// cursor starts over.
//
// Times are taken by events on the device, and read later, when they are over: what a step waited
// for its pages (its stall), how long a pass took. Thread-safe; steps of several threads may be
// open at once. The host never waits here but where the region does.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "device/event_pool.hpp"
#include "region/region.hpp"
#include "schedule/schedule.hpp"
#include "streamer/timeline.hpp"

namespace penstock {

using StepId = std::uint32_t;

/// What has happened since the streamer was made.
struct StreamerStats {
  std::uint64_t passes = 0;
  std::uint64_t steps = 0;
  std::uint64_t unscheduled = 0;   ///< Steps that the order did not have, and reads outside steps.
  std::uint64_t misses = 0;        ///< Loads that a step had to demand.
  std::uint64_t loaded_bytes = 0;  ///< By whole pages.
};

class Streamer : private PageObserver {
 public:
  explicit Streamer(std::shared_ptr<Region> region);
  /// Ends the steps that are left open, on the streams on which they began.
  ~Streamer() override;
  Streamer(const Streamer&) = delete;
  Streamer& operator=(const Streamer&) = delete;

  /// Says which pages a step reads. @throws std::out_of_range for a page that does not exist.
  /// @param name  For profilers.
  void define(StepId id, std::vector<PageIndex> pages, std::string name = "step");
  /// Expects steps in this order, over and over, from the first on.
  /// @param pages  For each place in the order, all pages in use there.
  void follow(std::vector<StepId> order, std::vector<std::vector<PageIndex>> pages);

  /// A pass begins, at the first step of the order; the one before it has ended.
  void begin_pass(StreamHandle stream);
  void end_pass(StreamHandle stream);

  /// Makes the step's pages ready for later work of `stream`.
  /// @throws CapExceededError where they do not fit beside what is in use, ScheduleError for a step
  ///         that was not defined.
  void begin(StepId id, StreamHandle stream) { begin(id, id, stream); }
  /// The same for a step that stands at another's place of the order.
  /// @param at  A step of the order; any other for a step that nobody could expect.
  void begin(StepId id, StepId at, StreamHandle stream);
  /// Lets go of the pages that the thread's latest `begin` of the step took, also where it throws a
  /// DeviceError. @throws ScheduleError for a step that the thread has not begun.
  void end(StepId id, StreamHandle stream);

  /// Loads ahead as far as there is room.
  void prefetch();

  /// While a pass is captured there is no loading beyond its end, and no taking of times.
  void set_capturing(bool capturing);

  /// Whether times are taken of every step and load, for `timeline`; else of stalls only.
  void set_trace(bool trace);
  bool tracing() const noexcept { return tracing_; }

  StreamerStats stats() const;
  /// The passes that ended last, oldest first, up to some tens of them.
  std::vector<PassStats> passes();
  /// What was traced; see Timeline.
  std::vector<Span> timeline();
  /// Seconds of compute at each place of the order, as the last traced pass took; empty if none
  /// was. A place that was not come to has 0.
  std::vector<double> step_seconds();

 private:
  using Pages = std::vector<PageIndex>;
  struct Open {
    StepId id;
    StreamHandle stream;
    std::shared_ptr<const Pages> pages;
    std::thread::id thread;
    Event since;          // when it began, where that is traced
    std::uint64_t range;  // on a profiler's timeline
    bool gives_way;       // others may take the room of its pages when it has ended
  };
  struct Upcoming {
    std::vector<StepId> order;
    std::vector<std::vector<PageIndex>> pages;
    std::unordered_map<StepId, std::vector<StepIndex>> places;  // of each step, ascending
  };

  // A page in the order of uses.
  struct Place {
    StepTime time = 0;     // of the step
    std::size_t page = 0;  // among the step's
  };
  // Pages to ask for at once, where each is used, and what comes next.
  struct Batch {
    std::vector<PageIndex> pages;
    std::vector<Place> places;
    Place end;
  };

  void on_load(PageIndex first, std::size_t count, std::size_t nbytes, const Event& start,
               const Event& ready, bool demanded) override;
  void on_evict(PageIndex first, std::size_t count, const Event& start, const Event& end) override;

  // With mutex_ held.
  void move_to(StepId id);
  void come_to(StepTime time);
  /// Goes as far as it can; `begin` meets the error again that stops it.
  /// @param whole_pass  Also what the step at hand reads, which while it runs is in place.
  void load_ahead(bool whole_pass = false) noexcept;
  void move_cursor(bool whole_pass);
  /// About `most` pages from the cursor on, those that stay left out.
  Batch batch_at_cursor(StepTime last, std::size_t most, const std::vector<bool>& staying) const;
  void skip_to(StepTime time);
  /// Whether it is time to load ahead though no room has become free.
  bool cursor_is_near() const;
  /// Whether it is so now that room has become free.
  bool is_worth_loading() const;
  void count_ahead(StepTime time);
  Event note_time(StreamHandle stream) noexcept;

  std::shared_ptr<Region> region_;
  EventPool events_;

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Pages>> steps_;  // by id; null: not defined
  std::vector<std::string> names_;                   // by id
  std::vector<Open> open_;                           // the latest last
  Upcoming upcoming_;
  StepTime now_ = 0;               // time of the last step that began; see Schedule
  Place cursor_{1, 0};             // the page that is loaded ahead next
  std::deque<std::size_t> ahead_;  // pages asked for ahead, of each step after now_
  std::size_t pages_ahead_ = 0;    // all of them
  bool blocked_ = false;           // the cursor waits for a step to end
  std::size_t freed_ = 0;          // pages that others may take, since the cursor moved
  bool capturing_ = false;
  std::atomic<bool> tracing_{false};
  std::uint64_t passes_ = 0;
  std::uint64_t steps_run_ = 0;
  std::uint64_t unscheduled_ = 0;
  PassStats pass_begin_;  // the totals when the pass began

  mutable std::mutex observed_mutex_;  // on_load and on_evict may come from the region's own thread
  bool demanded_ = false;              // since the cursor was set
  std::uint64_t misses_ = 0;
  std::uint64_t loaded_bytes_ = 0;
  Timeline timeline_;
};

}  // namespace penstock
