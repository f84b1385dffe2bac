#include "planner/planner.hpp"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "planner/draft.hpp"
#include "planner/reads.hpp"
#include "planner/resident_set.hpp"
#include "planner/simulation.hpp"

namespace penstock {

namespace {

// Frames of the ring beyond those of the largest step: one page in flight and one waiting, for
// what the model leaves out; more where the steps' times are unknown.
constexpr std::size_t kRoom = 2;
constexpr std::size_t kRoomInDoubt = 4;
constexpr std::size_t kRingBytesInDoubt = std::size_t{64} << 20;

constexpr double kAsGood = 1.001;    // times that are as good as the best one
constexpr double kRoomPrice = 1.05;  // what such room may cost

constexpr std::size_t kLittleShare = 16;  // of the frames that may stay

class Planner {
 public:
  explicit Planner(const PlanRequest& request)
      : request_(request), reads_(request), drafter_(request, reads_) {}

  Plan run() {
    check_cap();
    const std::size_t rest = reads_.page_count() - reads_.kept_count;
    const bool fit = reads_.page_count() <= request_.frames;
    if (fit && reads_.streamed_count == 0) return drafter_.with_all_resident().plan;
    if (reads_.step_count() == 0) {
      return drafter_.with_first_resident(std::min(doubtful_ring(), rest)).plan;
    }
    if (to_stream() == 0) return drafter_.with_all_read_resident().plan;
    return best(drafts()).plan;
  }

 private:
  void check_cap() const {
    const std::size_t least = reads_.least_frames();
    if (least <= request_.frames) return;
    const std::size_t needed = least * request_.page_size;
    const std::size_t there = request_.frames * request_.page_size;
    throw CapExceededError("the largest step reads " + std::to_string(reads_.largest_step) +
                               " pages beside " + std::to_string(reads_.kept_count) +
                               " that have to stay: it needs " + std::to_string(least) +
                               " frames, " + format_bytes(needed) + ", and there are " +
                               std::to_string(request_.frames) + ", " + format_bytes(there) +
                               "; raise the cap by " + format_bytes(needed - there) + " at least",
                           needed, there, 0);
  }

  // The ring for steps of unknown times.
  std::size_t doubtful_ring() const {
    const std::size_t pages = (kRingBytesInDoubt + request_.page_size - 1) / request_.page_size;
    return std::min(std::max(pages, kRoomInDoubt), std::max<std::size_t>(spare() / 2, 1));
  }

  // The ring for little pages: beside the largest step, room for a copy of several steps' pages and
  // for the one behind it, as far as that takes little from what stays. It grows with the frames,
  // one by one: more frames never stream more.
  std::size_t ring_for_copies(std::size_t step) const {
    const std::size_t pages = kLittleCopy / request_.page_size;  // of such a copy
    return pages < 2 ? 1 : std::clamp<std::size_t>(spare() / kLittleShare, 1, step + 2 * pages);
  }

  // Frames beside those of pages that have to stay.
  std::size_t spare() const { return request_.frames - reads_.kept_count; }

  std::size_t read_and(const std::vector<bool>& pages, bool value) const {
    return static_cast<std::size_t>(
        std::count_if(reads_.order.begin(), reads_.order.end(),
                      [&](PageIndex page) { return pages[page] == value; }));
  }

  // Pages that are read and find no frame of their own, if all frames but one are given to them.
  std::size_t to_stream() const {
    const std::size_t moving = read_and(reads_.kept, false) + 1;
    return std::max(moving - std::min(moving, spare()), read_and(reads_.streamed, true));
  }

  // The largest ring. Where nothing streams but what has to, two pages to a frame: one that had a
  // frame to itself would stay.
  std::size_t most_ring(std::size_t least) const {
    const std::size_t streamed = read_and(reads_.streamed, true);
    if (streamed == 0 || to_stream() > streamed) return spare();
    const std::size_t others = read_and(reads_.kept, false) - streamed;
    return std::max(least, std::min(spare() - others, streamed / 2));
  }

  std::vector<std::size_t> ring_sizes() const;
  std::vector<Draft> drafts() const;
  const Draft& best(const std::vector<Draft>& drafts) const;

  const PlanRequest& request_;
  const Reads reads_;
  const Drafter drafter_;
};

// Each size up to a few above the smallest and above the largest step, then ever fewer; a ring of
// more frames than there are pages too many would leave some without a second page.
std::vector<std::size_t> Planner::ring_sizes() const {
  constexpr std::size_t kEach = 16;
  auto feasible = [&](std::size_t ring) {
    ResidentQuery query{request_.frames - ring, ring, ring, SpreadBy::kPages, {}};
    return choose_resident(reads_, reads_.kept, query).has_value();
  };
  const std::size_t step = std::max<std::size_t>(reads_.largest_step, 1);
  std::size_t least = 1;
  for (std::size_t high = step; least < high;) {
    const std::size_t middle = least + (high - least) / 2;
    if (feasible(middle)) {
      high = middle;
    } else {
      least = middle + 1;
    }
  }
  const std::size_t limit = most_ring(least);
  least = std::clamp(std::max(request_.least_ring, ring_for_copies(step)), least, limit);
  const std::size_t wanted = std::max(to_stream(), step + kRoomInDoubt);
  const std::size_t most = std::clamp(wanted, least, limit);
  std::vector<std::size_t> sizes;
  for (std::size_t size = least; size < most;) {
    sizes.push_back(size);
    const bool each = size < least + kEach || (size >= step && size < step + kRoomInDoubt);
    std::size_t next = each ? size + 1 : size + 1 + size / 8;
    if (size < step && next > step) next = step;
    size = next;
  }
  sizes.push_back(most);
  sizes.push_back(std::clamp(doubtful_ring(), least, limit));
  sizes.push_back(limit);
  std::sort(sizes.begin(), sizes.end());
  sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
  return sizes;
}

std::vector<Draft> Planner::drafts() const {
  const bool timed = !request_.step_seconds.empty();
  const bool some_time = std::any_of(request_.step_seconds.begin(), request_.step_seconds.end(),
                                     [](double seconds) { return seconds > 0; });
  const std::size_t wanted = timed ? kRoom : kRoomInDoubt;
  std::vector<Draft> drafts;
  auto add = [&](const ResidentQuery& query) {
    auto made = drafter_.with_ring(query);
    if (made) drafts.push_back(std::move(*made));
    return made.has_value();
  };
  for (const std::size_t ring : ring_sizes()) {
    ResidentQuery query{request_.frames - ring, ring, ring - std::min(ring, wanted),
                        SpreadBy::kPages, request_.step_seconds};
    if (query.largest_step == 0 || !add(query)) {
      query.largest_step = ring;
      add(query);
    }
    query.spread_by = SpreadBy::kTime;
    if (some_time) add(query);
    query.spread_by = SpreadBy::kSteps;
    add(query);
  }
  return drafts;
}

const Draft& Planner::best(const std::vector<Draft>& drafts) const {
  std::vector<const Draft*> left;
  const auto fewest =
      std::min_element(drafts.begin(), drafts.end(),
                       [](const Draft& a, const Draft& b) { return a.collisions < b.collisions; });
  for (const Draft& draft : drafts) {
    if (draft.collisions == fewest->collisions) left.push_back(&draft);
  }
  auto cheapest = [&] {
    double cost = left.front()->cost;
    for (const Draft* draft : left) cost = std::min(cost, draft->cost);
    return cost;
  };
  auto narrow = [&](auto good) {
    std::vector<const Draft*> good_ones;
    std::copy_if(left.begin(), left.end(), std::back_inserter(good_ones), good);
    if (!good_ones.empty()) left = std::move(good_ones);
  };
  if (request_.step_seconds.empty()) {
    narrow([&](const Draft* draft) { return draft->room >= kRoomInDoubt; });
    narrow([&](const Draft* draft) { return draft->plan.ring >= doubtful_ring(); });
  }
  const double limit = cheapest() * kRoomPrice;
  narrow([&](const Draft* draft) { return draft->room >= kRoom && draft->cost <= limit; });
  const double as_good = cheapest() * kAsGood;
  narrow([&](const Draft* draft) { return draft->cost <= as_good; });
  return **std::min_element(left.begin(), left.end(), [](const Draft* a, const Draft* b) {
    if (a->plan.ring != b->plan.ring) return a->plan.ring < b->plan.ring;
    return a->cost < b->cost;
  });
}

}  // namespace

std::size_t least_frames(const PlanRequest& request) {
  return Reads(request).least_frames();
}

Plan make_plan(const PlanRequest& request) {
  return Planner(request).run();
}

double predict_seconds(const PlanRequest& request, const Plan& plan) {
  return pass_seconds(Reads(request), request, plan);
}

}  // namespace penstock
