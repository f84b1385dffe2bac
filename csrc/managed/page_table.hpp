// The page table knows, for every page of one region, its state, who has it pinned, when it was
// used last and when the schedule uses it next. It decides which pages go when room is needed. It
// is pure bookkeeping: no device, no clock, no locks (its owner locks), and the same calls always
// give the same answers.
//
// States, and the calls that change them (all others throw ScheduleError):
//
//     absent --begin_load--> loading --finish_load--> resident --begin_evict--> evicting
//       ^                      |                         ^                          |
//       |<------cancel_load----+                         |<------cancel_evict-------+
//       |<-----------------------------------------------------finish_evict---------+
//
// A pinned page is never evicted; pages in any state may be pinned, so that a page is safe from the
// moment it is wanted. A victim is a resident page without pins. Which one goes first depends on
// whether a plan has said which pages are kept:
//
// - Nothing is kept: the page whose next use is farthest away; pages that the schedule does not
//   name count as never used again; among equals the least recently used, then the highest index.
//   Without a schedule that is LRU.
// - Pages are kept: of the others the least recently used, then the highest index; they only pass
//   through, and who read the oldest of them is most likely to be done. Once there is none of them
//   left, the kept pages, by farthest next use as above; they stay kept when they are gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "schedule/schedule.hpp"

namespace penstock {

enum class PageState : std::uint8_t { kAbsent, kLoading, kResident, kEvicting };

class PageTable {
 public:
  /// @param page_count  Pages, all absent.
  explicit PageTable(std::size_t page_count);

  std::size_t page_count() const noexcept { return pages_.size(); }
  PageState state(PageIndex page) const { return pages_.at(page).state; }
  std::uint32_t pins(PageIndex page) const { return pages_.at(page).pins; }
  std::size_t count(PageState state) const noexcept;

  void begin_load(PageIndex page);
  void finish_load(PageIndex page);
  void cancel_load(PageIndex page);
  void begin_evict(PageIndex page);
  void finish_evict(PageIndex page);
  void cancel_evict(PageIndex page);

  void pin(PageIndex page);
  void unpin(PageIndex page);

  /// Makes `page` the most recently used.
  void touch(PageIndex page);

  /// Replaces the pages that are kept; none of them: no plan.
  /// @throws std::out_of_range for a page that does not exist; nothing has changed then.
  void keep(const std::vector<PageIndex>& pages);
  bool kept(PageIndex page) const { return pages_.at(page).kept; }
  std::size_t kept_count() const noexcept { return kept_count_; }
  /// Kept pages that are not resident.
  std::size_t kept_missing() const noexcept { return kept_count_ - kept_resident_; }
  /// Pages that are pinned and not kept.
  std::size_t pinned_passing() const noexcept { return pinned_passing_; }

  /// Replaces the schedule; its first step is the next to run.
  void set_schedule(std::vector<std::vector<PageIndex>> steps);
  /// The steps up to and including the next occurrence of `step` have come.
  void advance(StepIndex step);
  const Schedule& schedule() const noexcept { return schedule_; }
  StepTime now() const noexcept { return now_; }
  StepTime next_use(PageIndex page) const { return pages_.at(page).next_use; }
  /// The next use, that by the step that has come included: it may not have pinned the page yet.
  StepTime use_to_come(PageIndex page) const;

  /// Up to `limit` pages to evict, in order, all of them used later than `after` and not kept.
  /// @param after  0 to admit every victim, the kept ones too.
  std::vector<PageIndex> victims(std::size_t limit, StepTime after = 0) const;

 private:
  struct Page {
    PageState state = PageState::kAbsent;
    std::uint32_t pins = 0;
    std::uint64_t last_use = 0;
    StepTime next_use = kNever;
    StepTime pinned_at = kNever;
    bool kept = false;
  };
  // Ascending order of this key is the order in which victims go: whether the page is kept, its
  // next use (the same for all that only pass through), its last use, its index.
  using VictimKey = std::tuple<bool, StepTime, std::uint64_t, PageIndex>;

  VictimKey key(PageIndex page) const;
  bool evictable(const Page& page) const {
    return page.state == PageState::kResident && page.pins == 0;
  }
  void move(PageIndex page, PageState from, PageState to);
  /// Takes a page into what is known of all pages together, or out of it.
  void count_in(PageIndex page);
  void count_out(PageIndex page);
  /// Changes a page, keeping that true.
  template <typename Change>
  void change(PageIndex index, Change apply);

  std::vector<Page> pages_;
  std::vector<std::size_t> counts_;
  std::set<VictimKey> victims_;
  std::size_t kept_count_ = 0;
  std::size_t kept_resident_ = 0;
  std::size_t pinned_passing_ = 0;
  Schedule schedule_;
  StepTime now_ = 0;
  std::uint64_t uses_ = 0;
};

}  // namespace penstock
