// Whom the managed pager evicts, and what it says when nobody is left. With its lock held.
#include <algorithm>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "pager/managed_pager.hpp"
#include "pager/page_runs.hpp"

namespace penstock {

std::vector<ManagedPager::Victims> ManagedPager::choose_victims(ManagedRegion& wanting,
                                                                std::size_t nbytes, StepTime after,
                                                                Urgency urgency) {
  // Idle regions first, then the wanting one, then what others are using; by last use within each.
  const auto rank = [&](const ManagedRegion* region) {
    if (region == &wanting) return 1;
    return region->active_ ? 2 : 0;
  };
  std::vector<ManagedRegion*> order = regions_;
  std::sort(order.begin(), order.end(), [&](const ManagedRegion* a, const ManagedRegion* b) {
    return std::pair(rank(a), a->last_activity_) < std::pair(rank(b), b->last_activity_);
  });
  std::vector<Victims> chosen;
  std::size_t found = 0;
  for (ManagedRegion* region : order) {
    if (urgency == Urgency::kAhead && rank(region) == 2) break;
    const bool bounded = urgency == Urgency::kAhead && region == &wanting;
    const std::size_t wanted = (nbytes - found) / page_size_ + 2;  // the last page may be short
    std::vector<PageIndex> taken;
    for (const PageIndex page : region->table_.victims(wanted, bounded ? after : StepTime{0})) {
      if (found >= nbytes) break;
      taken.push_back(page);
      found += region->page_nbytes(page);
    }
    if (!taken.empty()) chosen.push_back({region, checked(*region, std::move(taken))});
    if (found >= nbytes) return chosen;
  }
  return {};  // not enough: nothing is evicted in vain
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
