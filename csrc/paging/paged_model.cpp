#include "paging/paged_model.hpp"

#include <algorithm>
#include <chrono>
#include <exception>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "paging/address_holds.hpp"

namespace penstock {

namespace {

constexpr StepId kUnforeseen = std::numeric_limits<StepId>::max();  // in no order
constexpr std::chrono::seconds kPatience{10};  // for operations of other threads to end
constexpr std::chrono::milliseconds kLookAgain{5};

std::size_t mix(std::size_t hash, std::size_t value) {
  return (hash ^ value) * 0x9E3779B97F4A7C15U;
}

}  // namespace

PagedModel::PagedModel(std::string name, std::shared_ptr<Streamer> streamer,
                       std::shared_ptr<Region> region, std::vector<TensorPlace> tensors)
    : name_(std::move(name)),
      region_(std::move(region)),
      streamer_(std::move(streamer)),
      tensors_(std::move(tensors)) {
  std::vector<std::vector<PageIndex>> order;
  for (const TensorPlace& tensor : tensors_) {
    const bool guessed = tensor.slice_nbytes > 0;
    guess_of_tensor_.push_back(guessed ? static_cast<StepId>(order.size()) : kUnforeseen);
    if (!guessed) continue;
    const std::size_t slice = tensor.slice_nbytes;
    for (std::size_t at = 0; at < tensor.nbytes; at += slice) {
      const std::size_t nbytes = std::min(slice, tensor.nbytes - at);
      const StepId step = add_step(nullptr, "weights", {{tensor.offset + at, nbytes}});
      order.push_back(*steps_[step].pages);
    }
  }
  followed_.resize(order.size());
  std::iota(followed_.begin(), followed_.end(), StepId{0});
  streamer_->follow(followed_, std::move(order));
}

// ---- operations --------------------------------------------------------------------------------

PagedModel::Hold PagedModel::begin(const PagingOperation& operation, const PagingRange* ranges,
                                   std::size_t count, bool patient) {
  tell_of_use();
  Hold hold;
  hold.written =
      std::any_of(ranges, ranges + count, [](const PagingRange& each) { return each.written; });
  if (hold.written) require_writable(operation, ranges, count);
  const StreamHandle stream{operation.stream};
  StepId& step = hold.step;
  StepId at = kUnforeseen;
  {
    std::unique_lock lock(mutex_);
    if (is_captured(stream)) {
      throw ScheduleError(
          "model \"" + name_ +
          "\" streams, so a graph of it is captured by MemoryManager.capture, which "
          "has its copies captured too");
    }
    step = find_step(operation, ranges, count);
    if (begins_pass(step, operation.in_backward)) change_pass(step, stream, lock);
    hold.pages = steps_[step].pages;
    if (count_in(step, operation.in_backward)) {
      at = guessing_ && count > 0 ? guess_for(ranges, count) : step;
    }
  }
  try {
    hold.in_place = !streamer_->tracing() && region_->begin_in_place(*hold.pages);
    if (!hold.in_place) streamer_->begin(step, at, stream);
    return hold;
  } catch (const CapExceededError& error) {
    drop_holder();
    const bool fits = hold.pages->size() * region_->page_size() <= room_;
    if (!fits || !patient) throw explain(step, error);
  } catch (const CheckpointError& error) {
    drop_holder();
    throw explain(step, error);
  } catch (...) {
    drop_holder();
    throw;
  }
  begin_after_others(hold, at, stream);
  return hold;
}

void PagedModel::require_writable(const PagingOperation& operation, const PagingRange* ranges,
                                  std::size_t count) const {
  try {
    region_->require_writable();
  } catch (const ModelError& error) {
    const PagingRange* const written =
        std::find_if(ranges, ranges + count, [](const PagingRange& each) { return each.written; });
    throw ModelError("model '" + name_ + "': " + operation.name + " would write to '" +
                     tensors_[tensor_at(offset_of(*written))].name + "', and " + error.what() +
                     ". Nothing has changed");
  }
}

bool PagedModel::begin_at_once(const PagingOperation& operation, const PagingRange* ranges,
                               std::size_t count, Hold& hold) {
  if (tells_of_use_.load(std::memory_order_relaxed) || streamer_->tracing()) return false;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || is_captured({operation.stream})) return false;
  const std::optional<StepId> step = known_step(operation, ranges, count);
  if (!step || begins_pass(*step, operation.in_backward)) return false;
  hold = {*step, true, false, steps_[*step].pages};
  if (!region_->begin_in_place(*hold.pages)) return false;
  try {
    count_in(*step, operation.in_backward);
  } catch (...) {
    region_->end(*hold.pages, {operation.stream});
    throw;
  }
  return true;
}

bool PagedModel::end_at_once(const Hold& hold, StreamHandle stream) {
  if (!hold.in_place || hold.written) return false;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || !region_->end_in_place(*hold.pages, stream)) return false;
  drop_holder_of_this_thread();
  return true;
}

void PagedModel::begin_after_others(const Hold& hold, StepId at, StreamHandle stream) {
  // One at a time, or who waits would take from each other what has become free.
  const std::lock_guard turn(waiting_);
  const auto until = std::chrono::steady_clock::now() + kPatience;
  for (;;) {
    // What threads have forgotten comes back; what they may be about to use is waited for.
    const bool addresses = AddressHolds::release_idle();
    std::uint64_t dropped = 0;
    bool alone = !addresses;
    {
      const std::lock_guard lock(mutex_);
      dropped = dropped_;
      const auto me = std::this_thread::get_id();
      alone = alone && std::all_of(holders_.begin(), holders_.end(),
                                   [&](std::thread::id holder) { return holder == me; });
      holders_.push_back(me);
    }
    try {
      streamer_->begin(hold.step, at, stream);
      return;
    } catch (const CapExceededError& error) {
      drop_holder();
      if (alone || std::chrono::steady_clock::now() > until) throw explain(hold.step, error);
    } catch (const CheckpointError& error) {
      drop_holder();
      throw explain(hold.step, error);
    } catch (...) {
      drop_holder();
      throw;
    }
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kLookAgain, [&] { return dropped_ > dropped + 1; });
  }
}

void PagedModel::drop_holder() noexcept {
  const std::lock_guard lock(mutex_);
  drop_holder_of_this_thread();
}

void PagedModel::drop_holder_of_this_thread() noexcept {
  const auto mine = std::find(holders_.rbegin(), holders_.rend(), std::this_thread::get_id());
  if (mine != holders_.rend()) holders_.erase(std::next(mine).base());
  ++dropped_;
  changed_.notify_all();
}

void PagedModel::end(const Hold& hold, const PagingOperation& operation, const PagingRange* ranges,
                     std::size_t count) {
  const StreamHandle stream{operation.stream};
  std::exception_ptr failure;
  for (std::size_t i = 0; i < count; ++i) {
    if (!ranges[i].written) continue;
    try {
      region_->note_write(offset_of(ranges[i]), ranges[i].nbytes, stream);
    } catch (...) {
      failure = std::current_exception();
    }
  }
  let_go(hold, stream);
  if (failure) std::rethrow_exception(failure);
}

PagedModel::AddressHold PagedModel::hold_address(const PagingOperation& operation,
                                                 PagingRange range, bool patient) {
  range.written = false;  // it may be, which is for the tier to keep if it can
  const Hold step = begin(operation, &range, 1, patient);
  // From here on the region alone holds them, as whoever lets go may be another thread.
  const AddressHold hold{step.pages, offset_of(range), range.nbytes, {operation.stream}};
  try {
    region_->begin(*hold.pages, hold.stream);
  } catch (...) {
    let_go(step, hold.stream);
    throw;
  }
  try {
    let_go(step, hold.stream);
  } catch (...) {
    region_->end(*hold.pages, hold.stream);
    throw;
  }
  return hold;
}

void PagedModel::let_go(const AddressHold& hold) {
  std::exception_ptr failure;
  try {
    if (region_->keeps_writes()) region_->note_write(hold.offset, hold.nbytes, hold.stream);
  } catch (...) {
    failure = std::current_exception();
  }
  region_->end(*hold.pages, hold.stream);
  if (failure) std::rethrow_exception(failure);
}

void PagedModel::let_go(const Hold& hold, StreamHandle stream) {
  try {
    if (hold.in_place) {
      region_->end(*hold.pages, stream);
    } else {
      streamer_->end(hold.step, stream);
    }
  } catch (...) {
    drop_holder();
    throw;
  }
  drop_holder();
}

std::size_t PagedModel::offset_of(const PagingRange& range) const {
  return static_cast<std::size_t>(static_cast<const std::byte*>(range.address) -
                                  region_->address());
}

std::vector<PageIndex> PagedModel::pages_of(const std::vector<Bytes>& ranges) const {
  std::vector<PageIndex> pages;
  for (const auto& [offset, nbytes] : ranges) {
    const std::vector<PageIndex> more = region_->pages_of(offset, nbytes);
    pages.insert(pages.end(), more.begin(), more.end());
  }
  std::sort(pages.begin(), pages.end());
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());
  return pages;
}

std::size_t PagedModel::tensor_at(std::size_t offset) const {
  const auto after =
      std::upper_bound(tensors_.begin(), tensors_.end(), offset,
                       [](std::size_t at, const TensorPlace& each) { return at < each.offset; });
  return static_cast<std::size_t>(std::max<std::ptrdiff_t>(after - tensors_.begin() - 1, 0));
}

StepId PagedModel::guess_for(const PagingRange* ranges, std::size_t count) const {
  const PagingRange* largest = std::max_element(
      ranges, ranges + count,
      [](const PagingRange& a, const PagingRange& b) { return a.nbytes < b.nbytes; });
  const std::size_t offset = offset_of(*largest);
  const std::size_t tensor = tensor_at(offset);
  const std::size_t slice = tensors_[tensor].slice_nbytes;
  if (slice == 0) return kUnforeseen;
  return guess_of_tensor_[tensor] + static_cast<StepId>((offset - tensors_[tensor].offset) / slice);
}

bool PagedModel::contains(const void* address) const {
  const auto* const at = static_cast<const std::byte*>(address);
  return at >= region_->address() && at < region_->address() + region_->nbytes();
}

bool PagedModel::is_captured(StreamHandle stream) const {
  return !capturing_ && region_->device().stream_capturing(stream);
}

std::size_t PagedModel::hash_of(const PagingOperation& operation, const PagingRange* ranges,
                                std::size_t count) const {
  std::size_t hash = std::hash<const void*>()(operation.id);
  for (std::size_t i = 0; i < count; ++i) {
    hash = mix(mix(hash, offset_of(ranges[i])), ranges[i].nbytes);
  }
  return hash;
}

std::optional<StepId> PagedModel::known_step(const PagingOperation& operation,
                                             const PagingRange* ranges, std::size_t count) const {
  const auto is_range = [&](const Bytes& known, const PagingRange& range) {
    return known.first == offset_of(range) && known.second == range.nbytes;
  };
  const auto is = [&](StepId id) {
    const Step& step = steps_[id];
    return step.operation == operation.id &&
           std::equal(step.ranges.begin(), step.ranges.end(), ranges, ranges + count, is_range);
  };
  if (place_ < followed_.size() && is(followed_[place_])) return followed_[place_];
  const auto [first, last] = step_ids_.equal_range(hash_of(operation, ranges, count));
  const auto found = std::find_if(first, last, [&](const auto& each) { return is(each.second); });
  if (found == last) return std::nullopt;
  return found->second;
}

StepId PagedModel::find_step(const PagingOperation& operation, const PagingRange* ranges,
                             std::size_t count) {
  if (const auto known = known_step(operation, ranges, count)) return *known;
  std::vector<Bytes> bytes;
  for (std::size_t i = 0; i < count; ++i)
    bytes.emplace_back(offset_of(ranges[i]), ranges[i].nbytes);
  const StepId step = add_step(operation.id, operation.name, std::move(bytes));
  step_ids_.emplace(hash_of(operation, ranges, count), step);
  return step;
}

StepId PagedModel::add_step(const void* operation, std::string name, std::vector<Bytes> ranges) {
  const auto id = static_cast<StepId>(steps_.size());
  auto pages = std::make_shared<const std::vector<PageIndex>>(pages_of(ranges));
  streamer_->define(id, *pages, name);
  steps_.push_back({operation, std::move(name), std::move(ranges), std::move(pages)});
  seen_in_.push_back(0);
  return id;
}

// ---- what is known -----------------------------------------------------------------------------

std::vector<StepId> PagedModel::order(StepId first) const {
  const std::lock_guard lock(mutex_);
  const std::vector<StepId>* known = learner_.known(first);
  return known == nullptr ? std::vector<StepId>() : *known;
}

std::vector<StepId> PagedModel::expected() const {
  const std::lock_guard lock(mutex_);
  return followed_;
}

std::vector<PageIndex> PagedModel::pages(StepId step) const {
  const std::lock_guard lock(mutex_);
  return *steps_.at(step).pages;
}

std::string PagedModel::describe(StepId step) const {
  std::string text;
  {
    const std::lock_guard lock(mutex_);
    text = steps_.at(step).name;
  }
  const std::vector<std::string> names = tensors(step);
  if (!names.empty()) text += " " + names.front();
  if (names.size() > 1) text += " and " + std::to_string(names.size() - 1) + " more";
  return text;
}

std::vector<std::string> PagedModel::tensors(StepId step) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const auto& [offset, nbytes] : steps_.at(step).ranges) {
    names.push_back(tensors_[tensor_at(offset)].name);
  }
  return names;
}

CapExceededError PagedModel::explain(StepId step, const CapExceededError& error) const {
  const std::size_t nbytes = pages(step).size() * region_->page_size();
  return {"model '" + name_ + "': " + describe(step) + " reads " + format_bytes(nbytes) +
              " at once, in whole pages. " + error.what(),
          error.requested, error.cap, error.used};
}

CheckpointError PagedModel::explain(StepId step, const CheckpointError& error) const {
  const std::vector<std::string> names = tensors(step);
  return {"model '" + name_ + "': " + describe(step) + " cannot be loaded: " + error.what(),
          error.path, error.offset, names.empty() ? "" : names.front()};
}

std::size_t PagedModel::part_bytes(const PagingRange* ranges, std::size_t count) const {
  std::size_t nbytes = 0;
  std::size_t by_pages = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (ranges[i].nbytes == 0) continue;
    const std::size_t offset = offset_of(ranges[i]);
    const std::size_t size = region_->page_size();
    nbytes += ranges[i].nbytes;
    by_pages += ((offset + ranges[i].nbytes - 1) / size - offset / size + 1) * size;
  }
  const std::size_t room = room_.load(std::memory_order_relaxed);
  if (by_pages <= room / 2) return std::numeric_limits<std::size_t>::max();
  return std::max<std::size_t>(room / 8 * nbytes / by_pages, 1);
}

// ---- handlers ----------------------------------------------------------------------------------

// Handlers may be Python's, and copying or destroying one takes its global lock: so that is done
// without this one.

void PagedModel::on_pass(PassHandler handler) {
  auto next = std::make_shared<const PassHandler>(std::move(handler));
  const std::lock_guard lock(handlers_mutex_);
  on_pass_.swap(next);
}

void PagedModel::on_next_use(UseHandler handler) {
  const bool tells = static_cast<bool>(handler);
  auto next = std::make_shared<const UseHandler>(std::move(handler));
  const std::lock_guard lock(handlers_mutex_);
  on_next_use_.swap(next);
  tells_of_use_ = tells;
}

void PagedModel::tell_of_use() {
  if (!tells_of_use_.load(std::memory_order_relaxed)) return;
  std::shared_ptr<const UseHandler> tell;
  {
    const std::lock_guard lock(handlers_mutex_);
    tell = std::exchange(on_next_use_, nullptr);
    tells_of_use_ = false;
  }
  if (tell && *tell) (*tell)();
}

}  // namespace penstock
