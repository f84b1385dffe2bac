#include "paging/paged_models.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <utility>

#include "error/error.hpp"
#include "paging/address_holds.hpp"
#include "paging/held_operation.hpp"

namespace penstock {

namespace {

std::atomic<unsigned> generation{0};  // of forks

}  // namespace

namespace {

// What this thread's operations hold, the innermost last, and what they held before, to be used
// again: operations take their memory from here.
struct ThreadHolds {
  std::vector<std::unique_ptr<HeldOperation>> held;
  std::vector<std::unique_ptr<HeldOperation>> spare;
  std::unique_ptr<AddressHolds> addresses;  // from the first one on

  bool has_addresses() const { return addresses && addresses->any(); }

  /// What was launched with addresses was launched.
  void release_addresses() const {
    if (has_addresses()) addresses->release();
  }

  /// Whether a range is held by operations that are under way.
  bool covers(const PagingRange& range) const {
    return std::any_of(held.rbegin(), held.rend(),
                       [&](const auto& outer) { return outer->covers(range); });
  }

  std::unique_ptr<HeldOperation> take() {
    if (spare.empty()) return std::make_unique<HeldOperation>();
    auto taken = std::move(spare.back());
    spare.pop_back();
    return taken;
  }
};

ThreadHolds& holds() {
  thread_local ThreadHolds mine;
  return mine;
}

}  // namespace

PagedModels& PagedModels::get() {
  static auto* const models = new PagedModels;  // operations may come while the process ends
  return *models;
}

PagedModels::PagedModels() {
  pthread_atfork(nullptr, nullptr, [] {
    ++generation;
    get().mutex_ = new std::shared_mutex;
  });
}

void PagedModels::add(const std::shared_ptr<PagedModel>& model) {
  const std::byte* begin = model->region()->address();
  const Known known{begin, begin + model->region()->page_count() * model->region()->page_size(),
                    model, generation.load()};
  const std::unique_lock lock(*mutex_);
  known_.erase(std::remove_if(known_.begin(), known_.end(),
                              [](const Known& each) { return each.model.expired(); }),
               known_.end());
  const auto after =
      std::upper_bound(known_.begin(), known_.end(), known,
                       [](const Known& a, const Known& b) { return a.begin < b.begin; });
  known_.insert(after, known);
}

std::shared_ptr<PagedModel> PagedModels::find(const void* address) const {
  const auto* const at = static_cast<const std::byte*>(address);
  const std::shared_lock lock(*mutex_);
  auto after = std::upper_bound(known_.begin(), known_.end(), at,
                                [](const std::byte* a, const Known& b) { return a < b.begin; });
  if (after == known_.begin()) return nullptr;
  --after;
  if (at >= after->end) return nullptr;
  std::shared_ptr<PagedModel> model = after->model.lock();
  if (model && after->generation != generation.load(std::memory_order_relaxed)) {
    throw ModelError(
        "these weights are paged by the process that this one was forked from, which goes on "
        "using the memory: copy what the child needs before forking (tensor.clone()), or start "
        "the child by spawn and load the model there");
  }
  return model;
}

HeldOperation* PagedModels::begin(const PagingOperation& operation, const PagingRange* ranges,
                                  std::size_t count) {
  ThreadHolds& mine = holds();
  mine.release_addresses();
  std::unique_ptr<HeldOperation> held = mine.take();
  held->operation = operation;
  for (std::size_t i = 0; i < count; ++i) {
    if (ranges[i].nbytes == 0 || mine.covers(ranges[i])) continue;
    std::shared_ptr<PagedModel> model = find(ranges[i].address);
    if (!model) continue;
    auto same = std::find_if(held->parts.begin(), held->parts.end(),
                             [&](const HeldOperation::Part& part) { return part.model == model; });
    if (same == held->parts.end()) {
      held->parts.push_back({std::move(model), {}, held->ranges.size(), 0});
      same = std::prev(held->parts.end());
    }
    // The ranges of one part lie together.
    const std::size_t at = same->first + same->count;
    held->ranges.insert(held->ranges.begin() + static_cast<std::ptrdiff_t>(at), ranges[i]);
    ++same->count;
    for (auto later = std::next(same); later != held->parts.end(); ++later) ++later->first;
  }
  if (held->parts.empty()) {
    mine.spare.push_back(std::move(held));
    return nullptr;
  }
  std::size_t begun = 0;
  try {
    for (; begun < held->parts.size(); ++begun) {
      HeldOperation::Part& part = held->parts[begun];
      part.hold = part.model->begin(operation, held->ranges.data() + part.first, part.count);
    }
  } catch (...) {
    const std::exception_ptr cause = std::current_exception();
    held->parts.resize(begun);
    try {
      held->end();
    } catch (const std::exception&) {  // the first failure says more
    }
    std::rethrow_exception(cause);
  }
  mine.held.push_back(std::move(held));
  return mine.held.back().get();
}

HeldOperation* PagedModels::begin_kernel(
    const PagedModel& model, const std::string& what,
    const std::vector<std::pair<std::size_t, std::size_t>>& ranges, StreamHandle stream) {
  static const char id = 0;
  std::vector<PagingRange> held;
  for (const auto& [offset, nbytes] : ranges) {
    held.push_back({model.region()->address() + offset, nbytes, false});
  }
  HeldOperation* begun = begin({&id, what.c_str(), stream.value, false}, held.data(), held.size());
  if (begun != nullptr) begun->operation.name = "a kernel";  // the text is the caller's
  return begun;
}

void PagedModels::end(HeldOperation* held) {
  ThreadHolds& mine = holds();
  const auto found = std::find_if(mine.held.rbegin(), mine.held.rend(),
                                  [&](const auto& each) { return each.get() == held; });
  if (found == mine.held.rend()) throw ScheduleError("end: the operation was not begun");
  std::unique_ptr<HeldOperation> ended = std::move(*found);
  mine.held.erase(std::next(found).base());
  ended->end();
  mine.spare.push_back(std::move(ended));
}

bool PagedModels::begin_at_once(const PagingOperation& operation, const PagingRange* ranges,
                                std::size_t count, HeldOperation** held) {
  ThreadHolds& mine = holds();
  const auto is_held = [&](const PagingRange& range) { return mine.covers(range); };
  *held = nullptr;
  if (std::all_of(ranges, ranges + count, is_held)) return true;
  if (mine.has_addresses() || std::any_of(ranges, ranges + count, is_held)) return false;
  std::shared_ptr<PagedModel> model = find(ranges[0].address);
  if (!model) return false;
  const auto is_there = [&](const PagingRange& range) {
    return range.nbytes > 0 && !range.written && model->contains(range.address);
  };
  if (!std::all_of(ranges, ranges + count, is_there)) return false;
  std::unique_ptr<HeldOperation> taken = mine.take();
  taken->operation = operation;
  taken->ranges.assign(ranges, ranges + count);
  taken->parts.push_back({std::move(model), {}, 0, count});
  HeldOperation::Part& part = taken->parts.back();
  mine.held.reserve(mine.held.size() + 1);  // what has begun is not lost
  if (part.model->begin_at_once(operation, ranges, count, part.hold)) {
    mine.held.push_back(std::move(taken));
    *held = mine.held.back().get();
    return true;
  }
  taken->parts.clear();
  taken->ranges.clear();
  mine.spare.push_back(std::move(taken));
  return false;
}

bool PagedModels::end_at_once(HeldOperation* held) {
  ThreadHolds& mine = holds();
  if (mine.held.empty() || mine.held.back().get() != held || held->parts.size() != 1) return false;
  const HeldOperation::Part& part = held->parts.front();
  if (!part.model->end_at_once(part.hold, StreamHandle{held->operation.stream})) return false;
  held->parts.clear();
  held->ranges.clear();
  mine.spare.push_back(std::move(mine.held.back()));
  mine.held.pop_back();
  return true;
}

std::uint64_t PagedModels::hold_address(const PagingOperation& operation, const PagingRange& range,
                                        std::uint64_t scope, bool patient) {
  ThreadHolds& mine = holds();
  if (range.nbytes == 0 || mine.covers(range)) return 0;
  if (!mine.addresses) mine.addresses = std::make_unique<AddressHolds>();
  AddressHolds& addresses = *mine.addresses;
  if (addresses.covers(range)) return addresses.id();
  std::shared_ptr<PagedModel> model = find(range.address);
  if (!model) return 0;
  PagedModel::AddressHold hold = model->hold_address(operation, range, patient);
  addresses.add(model, std::move(hold), range, scope);
  return addresses.id();
}

void PagedModels::release_addresses() {
  holds().release_addresses();
}

bool PagedModels::release_ended_addresses(const std::vector<std::uint64_t>& open) {
  const auto& addresses = holds().addresses;
  return addresses && addresses->release_ended(open);
}

std::size_t PagedModels::part_bytes(const PagingRange* ranges, std::size_t count) const {
  std::vector<std::pair<std::shared_ptr<PagedModel>, std::vector<PagingRange>>> models;
  for (std::size_t i = 0; i < count; ++i) {
    std::shared_ptr<PagedModel> model = find(ranges[i].address);
    if (!model) continue;
    auto same = std::find_if(models.begin(), models.end(),
                             [&](const auto& known) { return known.first == model; });
    if (same == models.end()) same = models.insert(models.end(), {std::move(model), {}});
    same->second.push_back(ranges[i]);
  }
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const auto& [model, mine] : models) {
    least = std::min(least, model->part_bytes(mine.data(), mine.size()));
  }
  return least;
}

}  // namespace penstock
