#include "paging/address_holds.hpp"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>

#include "paging/held_operation.hpp"

namespace penstock {

namespace {

constexpr std::chrono::seconds kIdle{1};

std::atomic<unsigned> generation{0};  // of forks

struct Known {
  std::mutex mutex;
  std::vector<AddressHolds*> threads;
};

// Never deleted, as threads may end late; replaced in a forked child, where nobody would unlock it.
Known*& known_slot() {
  static Known* slot = [] {
    pthread_atfork(nullptr, nullptr, [] {
      ++generation;
      known_slot() = new Known;
    });
    return new Known;
  }();
  return slot;
}

Known& known() {
  return *known_slot();
}

std::uint64_t next_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

AddressHolds::AddressHolds() : id_(next_id()), thread_(std::this_thread::get_id()) {}

AddressHolds::~AddressHolds() {
  std::vector<Held> taken;
  {
    const std::lock_guard lock(known().mutex);
    auto& threads = known().threads;
    threads.erase(std::remove(threads.begin(), threads.end(), this), threads.end());
    taken = take_all();
  }
  try {
    let_go(std::move(taken));
  } catch (...) {  // nobody is there to be told
  }
}

bool AddressHolds::covers(const PagingRange& range) {
  const std::lock_guard lock(known().mutex);
  return std::any_of(held_.begin(), held_.end(),
                     [&](const Held& each) { return lies_in(range, each.range); });
}

void AddressHolds::add(const std::shared_ptr<PagedModel>& model, PagedModel::AddressHold hold,
                       const PagingRange& range, std::uint64_t scope) {
  const std::lock_guard lock(known().mutex);
  if (held_.empty()) {
    generation_ = generation;
    auto& threads = known().threads;
    if (std::find(threads.begin(), threads.end(), this) == threads.end()) threads.push_back(this);
  }
  held_.push_back({model, std::move(hold), range, scope});
  latest_ = Clock::now();
  any_ = true;
}

std::vector<AddressHolds::Held> AddressHolds::take_all() {
  any_ = false;
  std::vector<Held> taken = std::exchange(held_, {});
  if (generation_ == generation) return taken;
  // A forked child: this is what the parent's thread holds, and may not be touched.
  static_cast<void>(new std::vector<Held>(std::move(taken)));
  return {};
}

void AddressHolds::let_go(std::vector<Held> taken) {
  std::exception_ptr failure;
  for (const Held& each : taken) {
    try {
      if (const auto model = each.model.lock()) model->let_go(each.hold);
    } catch (...) {
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

void AddressHolds::release() {
  std::vector<Held> taken;
  {
    const std::lock_guard lock(known().mutex);
    taken = take_all();
  }
  let_go(std::move(taken));
}

bool AddressHolds::release_ended(const std::vector<std::uint64_t>& open) {
  std::vector<Held> taken;
  {
    const std::lock_guard lock(known().mutex);
    const auto ended = [&](const Held& each) {
      return each.scope != 0 && std::find(open.begin(), open.end(), each.scope) == open.end();
    };
    const auto first = std::stable_partition(held_.begin(), held_.end(), std::not_fn(ended));
    std::move(first, held_.end(), std::back_inserter(taken));
    held_.erase(first, held_.end());
    const auto oldest =
        std::find_if(held_.begin(), held_.end(), [](const Held& each) { return each.scope == 0; });
    if (taken.empty() && oldest != held_.end()) {
      taken.push_back(std::move(*oldest));
      held_.erase(oldest);
    }
    any_ = !held_.empty();
  }
  const bool some = !taken.empty();
  let_go(std::move(taken));
  return some;
}

bool AddressHolds::release_idle() {
  std::vector<Held> taken;
  bool left = false;
  {
    const std::lock_guard lock(known().mutex);
    const auto now = Clock::now();
    for (AddressHolds* each : known().threads) {
      if (each->held_.empty() || each->thread_ == std::this_thread::get_id()) continue;
      if (now - each->latest_ < kIdle) {
        left = true;
        continue;
      }
      auto idle = each->take_all();
      std::move(idle.begin(), idle.end(), std::back_inserter(taken));
    }
  }
  let_go(std::move(taken));
  return left;
}

void AddressHolds::release_of(std::uint64_t thread) {
  std::vector<Held> taken;
  {
    const std::lock_guard lock(known().mutex);
    for (AddressHolds* each : known().threads) {
      if (each->id_ == thread) taken = each->take_all();
    }
  }
  let_go(std::move(taken));
}

}  // namespace penstock
