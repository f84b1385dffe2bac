// Whom the managed pager evicts, and what it says when nobody is left. With its lock held.
#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "managed/managed_pager.hpp"
#include "managed/region_pages.hpp"

namespace penstock {

namespace {

// Whether the work of events is over, asking the device as little as can be: where an event of a
// stream is not over, a later one is not either.
class Done {
 public:
  explicit Done(Device& device) : device_(device) {}

  bool operator()(const void* stream, const Event& event) {
    if (!event) return true;
    if (busy_.count(stream) > 0) return false;
    const auto [known, is_new] = over_.emplace(event.get(), false);
    if (is_new) known->second = device_.event_done(event->get());
    if (!known->second) busy_.insert(stream);
    return known->second;
  }

 private:
  Device& device_;
  std::set<const void*> busy_;
  std::map<const OwnedEvent*, bool> over_;
};

}  // namespace

StepTime ManagedPager::time_wanted(const ManagedRegion& region,
                                   const std::vector<PageIndex>& pages) const {
  const PageTable& table = region.table_;
  StepTime time = std::max<StepTime>(table.now(), 1);
  for (const PageIndex page : pages) {
    if (table.pins(page) == 0) time = std::max(time, table.use_to_come(page));
  }
  return time;
}

ManagedPager::Missing ManagedPager::missing_after(const ManagedRegion& region, StepTime after,
                                                  std::size_t most) const {
  const PageTable& table = region.table_;
  const Schedule& schedule = table.schedule();
  Missing missing;
  const StepTime end = table.now() + schedule.step_count();  // a pass ahead
  for (StepTime time = std::max(after, table.now()) + 1; time < end && missing.count < most;
       ++time) {
    const auto step = static_cast<StepIndex>((time - 1) % schedule.step_count());
    for (const PageIndex page : schedule.pages_of(step)) {
      if (table.state(page) != PageState::kAbsent || missing.count == most) continue;
      ++missing.count;
      missing.last_use = time;
    }
  }
  return missing;
}

std::vector<PageIndex> ManagedPager::victims_of(const ManagedRegion& region, std::size_t count,
                                                StepTime after, Readers readers) const {
  const PageTable& table = region.table_;
  if (table.kept_count() == 0) return table.victims(count, after);
  const auto choose = [&](std::size_t limit) {
    std::vector<PageIndex> pages = table.victims(limit, after);
    if (after == 0) return pages;
    // The step that has come may not have pinned its pages yet: its use of them is still to come.
    const auto used = [&](PageIndex page) { return table.use_to_come(page) <= table.now(); };
    pages.erase(std::remove_if(pages.begin(), pages.end(), used), pages.end());
    return pages;
  };
  std::vector<PageIndex> pages = choose(count);
  Done done(*device_);
  const auto free = [&](PageIndex page) {
    const auto& events = region.events_[page];
    // A page that nobody has read since it was loaded has its use before it.
    if (events.readers.empty() && after == 0) return false;
    return done(this, events.ready) &&
           std::all_of(events.readers.begin(), events.readers.end(),
                       [&](const auto& reader) { return done(reader.first, reader.second); });
  };
  if (pages.size() >= count && std::all_of(pages.begin(), pages.end(), free)) return pages;
  pages = choose(table.page_count());
  const auto kept =
      std::find_if(pages.begin(), pages.end(), [&](PageIndex page) { return table.kept(page); });
  const auto busy = std::stable_partition(pages.begin(), kept, free);
  if (readers == Readers::kDone) pages.erase(busy, pages.end());
  return pages;
}

std::vector<ManagedPager::Victims> ManagedPager::choose_victims(ManagedRegion& wanting,
                                                                std::size_t nbytes, StepTime after,
                                                                Urgency urgency) const {
  // Idle regions first, then the wanting one, then what others are using; by turn and last use
  // within each.
  const auto rank = [&](const ManagedRegion* region) {
    if (region == &wanting) return 1;
    return region->active_ ? 2 : 0;
  };
  std::vector<ManagedRegion*> order;
  std::copy_if(regions_.begin(), regions_.end(), std::back_inserter(order),
               [&](const ManagedRegion* region) { return region == &wanting || region->turn_; });
  std::sort(order.begin(), order.end(), [&](const ManagedRegion* a, const ManagedRegion* b) {
    return std::tuple(rank(a), a->turn_, a->last_activity_) <
           std::tuple(rank(b), b->turn_, b->last_activity_);
  });
  std::vector<Victims> chosen;
  std::size_t found = 0;
  for (ManagedRegion* region : order) {
    if (urgency == Urgency::kAhead && rank(region) == 2) break;
    const std::size_t wanted = (nbytes - found) / page_size_ + 2;  // the last page may be short
    std::vector<PageIndex> taken;
    for (const PageIndex page :
         victims_of(*region, wanted, region == &wanting ? after : 0, Readers::kAny)) {
      if (found >= nbytes) break;
      taken.push_back(page);
      found += region->page_nbytes(page);
    }
    if (!taken.empty()) chosen.push_back({region, checked(*region, std::move(taken))});
    if (found >= nbytes) return chosen;
  }
  return {};  // not enough: nothing is evicted in vain
}

AheadSizes ManagedPager::sizes_of(const ManagedRegion& region) const {
  const PageTable& table = region.table_;
  const std::size_t largest = std::max<std::size_t>(kLargestBatch / page_size_, 1);
  const std::size_t kept = table.kept_count();
  if (kept == 0) {
    const std::size_t window = std::max<std::size_t>(budget_->cap() / page_size_ / 2, 1);
    return {std::clamp<std::size_t>(window / kBatchesInRing, 1, largest), window};
  }
  const BudgetStats ledger = budget_->stats();
  std::size_t others = ledger.used - ledger.used_by_tag[static_cast<std::size_t>(Tag::kWeights)];
  for (const ManagedRegion* each : regions_) {
    if (each == &region || !each->active_) continue;
    others += (each->page_count() - each->table_.count(PageState::kAbsent)) * page_size_;
  }
  const std::size_t usable = (ledger.cap - std::min(others, ledger.cap)) / page_size_;
  const std::size_t room = usable - std::min(kept, usable);  // for pages that pass through
  const std::size_t batch = std::clamp<std::size_t>(room / kBatchesInRing, 1, largest);
  // Beside what is ahead: what is in use. The last batch is asked for below the window, and ends
  // beyond it; it may be a little larger.
  const std::size_t taken = table.pinned_passing() + batch + batch / 8 - 1;
  const std::size_t window = room > taken ? room - taken : 1;
  // What stays takes none of that room, and is asked for ahead until it is there.
  return {batch, window + std::min(table.kept_missing(), usable)};
}

CapExceededError ManagedPager::refusal(const ManagedRegion& region, std::size_t nbytes) const {
  const BudgetStats ledger = budget_->stats();
  std::size_t pinned = 0;
  for (const ManagedRegion* each : regions_) {
    for (std::size_t i = 0; i < each->page_count(); ++i) {
      const auto page = static_cast<PageIndex>(i);
      if (each->table_.state(page) == PageState::kResident && each->table_.pins(page) > 0) {
        pinned += each->page_nbytes(page);
      }
    }
  }
  const std::size_t others =
      ledger.used - ledger.used_by_tag[static_cast<std::size_t>(Tag::kWeights)];
  return {"cannot bring in " + format_bytes(nbytes) + " of a region of " +
              format_bytes(region.nbytes()) + ": the cap is " + format_bytes(ledger.cap) + ", " +
              format_bytes(ledger.used) + " are in use and " + format_bytes(pinned) +
              " of them are being read now. Raise the cap to at least " +
              format_bytes(others + pinned + nbytes) + ", or use less at once.",
          nbytes, ledger.cap, ledger.used};
}

}  // namespace penstock
