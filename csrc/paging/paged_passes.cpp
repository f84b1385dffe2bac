// How a paged model finds where passes begin and end, and what it does then.
#include <algorithm>
#include <optional>
#include <utility>

#include "paging/paged_model.hpp"

namespace penstock {

namespace {

constexpr std::size_t kLongPass = 64;  // steps, from which on a pass without a call may go round
constexpr std::size_t kManyBeside = 4096;  // steps of other threads than that of the pass

}  // namespace

bool PagedModel::is_mine(bool in_backward) const {
  return state_ != State::kOutside && (in_backward || owner_ == std::this_thread::get_id());
}

bool PagedModel::goes_round() const {
  return state_ != State::kCall && pass_.size() >= kLongPass && pass_.size() > 3 * distinct_;
}

bool PagedModel::begins_pass(StepId step, bool in_backward) const {
  if (in_backward || capturing_) return false;
  if (state_ == State::kOutside) return true;
  if (call_begun_ && caller_ == std::this_thread::get_id()) return true;
  if (owner_ != std::this_thread::get_id()) return beside_ > kManyBeside;  // who owns it has gone
  if (state_ == State::kCall) return false;
  return (!pass_.empty() && step == pass_.front()) || goes_round();
}

void PagedModel::change_pass(StepId first, StreamHandle stream,
                             std::unique_lock<std::mutex>& lock) {
  const bool cut_short = call_begun_ ? state_ != State::kAfterCall : beside_ > kManyBeside;
  if (const auto ended = close_pass(stream, !cut_short && !goes_round())) {
    lock.unlock();
    tell_of_pass(*ended);
    lock.lock();
  }
  open_pass(first, stream);
}

void PagedModel::tell_of_pass(const PassEnd& end) {
  std::shared_ptr<const PassHandler> tell;
  {
    const std::lock_guard lock(handlers_mutex_);
    tell = on_pass_;
  }
  if (tell && *tell) (*tell)(end);
}

void PagedModel::open_pass(StepId first, StreamHandle stream) {
  const bool by_call = call_begun_ && caller_ == std::this_thread::get_id();
  state_ = by_call ? State::kCall : State::kAlone;
  if (by_call) call_begun_ = false;
  beside_ = 0;
  owner_ = std::this_thread::get_id();
  pass_.clear();
  distinct_ = 0;
  ++pass_number_;
  follow_order_of(first);
  place_ = 0;
  streamer_->begin_pass(stream);
}

std::optional<PassEnd> PagedModel::close_pass(StreamHandle stream, bool worth_learning) {
  if (pass_.empty()) return std::nullopt;
  PassEnd end;
  end.first = pass_.front();
  streamer_->end_pass(stream);
  if (worth_learning) end.changed = learner_.learn(pass_);
  pass_.clear();
  if (!worth_learning) return std::nullopt;
  if (end.changed) follow_order_of(end.first);
  return end;
}

void PagedModel::follow_order_of(StepId first) {
  const std::vector<StepId>* known = learner_.known(first);
  if (known == nullptr || (!guessing_ && *known == followed_)) return;
  std::vector<std::vector<PageIndex>> order;
  order.reserve(known->size());
  for (const StepId step : *known) order.push_back(*steps_[step].pages);
  followed_ = *known;
  guessing_ = false;
  streamer_->follow(followed_, std::move(order));
}

bool PagedModel::count_in(StepId step, bool in_backward) {
  const bool mine = is_mine(in_backward);
  if (mine) {
    note(step);
  } else {
    ++beside_;
  }
  holders_.push_back(std::this_thread::get_id());
  return mine;
}

void PagedModel::note(StepId step) {
  if (capturing_) return;
  pass_.push_back(step);
  if (seen_in_[step] != pass_number_) ++distinct_;
  seen_in_[step] = pass_number_;
  const auto here = followed_.begin() + static_cast<std::ptrdiff_t>(place_);
  const auto found = std::find(here, followed_.end(), step);
  if (found != followed_.end()) place_ = static_cast<std::size_t>(found - followed_.begin()) + 1;
}

void PagedModel::begin_call() {
  const std::lock_guard lock(mutex_);
  const auto me = std::this_thread::get_id();
  if (capturing_ || (state_ == State::kCall && owner_ != me)) return;  // beside another thread's
  call_begun_ = true;
  caller_ = me;
}

void PagedModel::end_call(StreamHandle stream, bool failed, bool complete) {
  std::optional<PassEnd> ended;
  {
    const std::lock_guard lock(mutex_);
    const auto me = std::this_thread::get_id();
    if (capturing_) return;
    if (call_begun_ && caller_ == me) {  // it read nothing
      call_begun_ = false;
      return;
    }
    if (state_ != State::kCall || owner_ != me) return;
    state_ = State::kAfterCall;
    if (failed || complete) {
      ended = close_pass(stream, !failed);
      state_ = State::kOutside;
    }
  }
  if (ended) tell_of_pass(*ended);
}

bool PagedModel::in_call() const {
  const std::lock_guard lock(mutex_);
  return call_begun_ || state_ == State::kCall;
}

void PagedModel::set_capturing(bool capturing) {
  const std::lock_guard lock(mutex_);
  capturing_ = capturing;
  call_begun_ = false;
  state_ = State::kOutside;
  pass_.clear();
  place_ = 0;
  streamer_->set_capturing(capturing);
  owner_ = std::this_thread::get_id();
  if (capturing) state_ = State::kCall;
}

}  // namespace penstock
