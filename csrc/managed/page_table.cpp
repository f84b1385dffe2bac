#include "managed/page_table.hpp"

#include <string>
#include <utility>

#include "error/error.hpp"

namespace penstock {

namespace {

constexpr const char* name(PageState state) {
  switch (state) {
    case PageState::kAbsent:
      return "absent";
    case PageState::kLoading:
      return "loading";
    case PageState::kResident:
      return "resident";
    case PageState::kEvicting:
      return "evicting";
  }
  return "unknown";
}

std::size_t slot(PageState state) {
  return static_cast<std::size_t>(state);
}

}  // namespace

PageTable::PageTable(std::size_t page_count) : pages_(page_count), counts_(4, 0) {
  counts_[slot(PageState::kAbsent)] = page_count;
}

std::size_t PageTable::count(PageState state) const noexcept {
  return counts_[slot(state)];
}

PageTable::VictimKey PageTable::key(PageIndex page) const {
  const Page& each = pages_[page];
  const bool passes_through = kept_count_ > 0 && !each.kept;
  // Complements turn "largest next use" and "highest index" into ascending order.
  return {each.kept, passes_through ? 0 : ~each.next_use, each.last_use, ~page};
}

void PageTable::count_in(PageIndex index) {
  const Page& page = pages_[index];
  if (evictable(page)) victims_.insert(key(index));
  ++counts_[slot(page.state)];
  if (page.kept && page.state == PageState::kResident) ++kept_resident_;
  if (!page.kept && page.pins > 0) ++pinned_passing_;
}

void PageTable::count_out(PageIndex index) {
  const Page& page = pages_[index];
  if (evictable(page)) victims_.erase(key(index));
  --counts_[slot(page.state)];
  if (page.kept && page.state == PageState::kResident) --kept_resident_;
  if (!page.kept && page.pins > 0) --pinned_passing_;
}

template <typename Change>
void PageTable::change(PageIndex index, Change apply) {
  Page& page = pages_.at(index);
  count_out(index);
  apply(page);
  count_in(index);
}

void PageTable::move(PageIndex page, PageState from, PageState to) {
  const PageState current = state(page);
  if (current != from) {
    throw ScheduleError("page " + std::to_string(page) + " is " + name(current) + ", not " +
                        name(from) + ": it cannot become " + name(to));
  }
  change(page, [&](Page& p) { p.state = to; });
}

void PageTable::begin_load(PageIndex page) {
  move(page, PageState::kAbsent, PageState::kLoading);
}
void PageTable::finish_load(PageIndex page) {
  move(page, PageState::kLoading, PageState::kResident);
}
void PageTable::cancel_load(PageIndex page) {
  move(page, PageState::kLoading, PageState::kAbsent);
}
void PageTable::begin_evict(PageIndex page) {
  if (pins(page) > 0) {
    throw ScheduleError("page " + std::to_string(page) + " is pinned: it cannot be evicted");
  }
  move(page, PageState::kResident, PageState::kEvicting);
}
void PageTable::finish_evict(PageIndex page) {
  move(page, PageState::kEvicting, PageState::kAbsent);
}
void PageTable::cancel_evict(PageIndex page) {
  move(page, PageState::kEvicting, PageState::kResident);
}

void PageTable::pin(PageIndex page) {
  change(page, [this](Page& p) {
    ++p.pins;
    p.pinned_at = now_;
  });
}

void PageTable::unpin(PageIndex page) {
  if (pins(page) == 0) throw ScheduleError("page " + std::to_string(page) + " is not pinned");
  change(page, [](Page& p) { --p.pins; });
}

void PageTable::touch(PageIndex page) {
  change(page, [this](Page& p) { p.last_use = ++uses_; });
}

void PageTable::keep(const std::vector<PageIndex>& pages) {
  for (const PageIndex page : pages) static_cast<void>(pages_.at(page));
  // The keys of all pages change, also those of pages that are kept as before.
  for (std::size_t i = 0; i < pages_.size(); ++i) count_out(static_cast<PageIndex>(i));
  for (Page& page : pages_) page.kept = false;
  kept_count_ = 0;
  for (const PageIndex page : pages) {
    if (!pages_[page].kept) ++kept_count_;
    pages_[page].kept = true;
  }
  for (std::size_t i = 0; i < pages_.size(); ++i) count_in(static_cast<PageIndex>(i));
}

void PageTable::set_schedule(std::vector<std::vector<PageIndex>> steps) {
  schedule_ = Schedule(pages_.size(), std::move(steps));
  now_ = 0;
  for (Page& page : pages_) page.pinned_at = kNever;
  for (std::size_t i = 0; i < pages_.size(); ++i) {
    const auto page = static_cast<PageIndex>(i);
    change(page, [&](Page& p) { p.next_use = schedule_.next_use(page, now_); });
  }
}

void PageTable::advance(StepIndex step) {
  const StepTime target = schedule_.time_of(step, now_);
  const StepTime count = schedule_.step_count();
  for (StepTime time = now_ + 1; time <= target; ++time) {
    for (const PageIndex page : schedule_.pages_of(static_cast<StepIndex>((time - 1) % count))) {
      change(page, [&](Page& p) { p.next_use = schedule_.next_use(page, target); });
    }
  }
  now_ = target;
}

StepTime PageTable::use_to_come(PageIndex page) const {
  const bool before = now_ == 0 || pages_.at(page).pinned_at == now_;
  return schedule_.next_use(page, before ? now_ : now_ - 1);
}

std::vector<PageIndex> PageTable::victims(std::size_t limit, StepTime after) const {
  std::vector<PageIndex> chosen;
  for (const VictimKey& each : victims_) {
    const PageIndex page = ~std::get<PageIndex>(each);
    if (chosen.size() == limit) break;
    if (after > 0 && pages_[page].kept) break;
    if (pages_[page].next_use > after) {
      chosen.push_back(page);
    } else if (kept_count_ == 0) {
      break;  // in the order of next uses all others come sooner
    }
  }
  return chosen;
}

}  // namespace penstock
