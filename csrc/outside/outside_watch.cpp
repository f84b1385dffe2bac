#include "outside/outside_watch.hpp"

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "error/format.hpp"

namespace penstock {

namespace {

constexpr int kReadings = 4;        // in one look, while the ledger changes
constexpr int kRounds = 4;          // of making room in one look, while others take it
constexpr int kFirstReadings = 64;  // until there is one that counts

}  // namespace

OutsideWatch::OutsideWatch(std::shared_ptr<FramePool> pool, OutsideOptions options)
    : pool_(std::move(pool)) {
  if (options.interval.count() <= 0) throw std::invalid_argument("an interval is above zero");
  stats_.reserve = options.reserve;
  bool measured = false;
  for (int i = 0; i < kFirstReadings && !measured; ++i) {
    if (i > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    measured = measure();
  }
  if (!measured) throw Error("the ledger never stood still: set the cap before it is used");
  const std::size_t wanted = stats_.held + stats_.reserve;
  charge(wanted);
  if (stats_.charged < wanted) {
    const CapExceededError error = refusal();
    charge(0);
    throw error;
  }
  thread_ = std::make_unique<PeriodicThread>([this] { look_quietly(); }, options.interval);
}

OutsideWatch::~OutsideWatch() {
  const bool forked = thread_ != nullptr && !thread_->in_owner_process();
  thread_.reset();
  if (!forked && stats_.charged > 0) pool_->budget().release(Tag::kOutside, stats_.charged);
}

bool OutsideWatch::look(std::chrono::milliseconds limit) {
  return thread_ != nullptr && thread_->run_now(limit);
}

void OutsideWatch::stop() {
  if (thread_ != nullptr && thread_->in_owner_process()) thread_.reset();
}

void OutsideWatch::set_reserve(std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  stats_.reserve = nbytes;
}

OutsideStats OutsideWatch::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void OutsideWatch::look_quietly() noexcept {
  try {
    look_and_charge();
    failing_ = false;
  } catch (const std::exception& error) {
    if (!std::exchange(failing_, true)) pool_->device()->suppress(error.what());
  }
}

void OutsideWatch::look_and_charge() {
  bool measured = false;
  for (int i = 0; i < kReadings && !measured; ++i) measured = measure();
  if (!measured) {
    const std::lock_guard lock(mutex_);
    ++stats_.discarded;
  }
  const OutsideStats seen = stats();
  charge(seen.held + seen.reserve);
  report_crossing();
}

bool OutsideWatch::measure() {
  const BudgetStats before = pool_->budget().stats();
  const std::optional<ProcessMemory> device = pool_->device()->process_memory();
  if (!device) {
    throw std::invalid_argument("this device cannot tell what the process holds on it");
  }
  const BudgetStats after = pool_->budget().stats();
  const auto outside = OutsideEstimate::outside_of(before, device->bytes, after);
  const std::lock_guard lock(mutex_);
  ++stats_.looks;
  stats_.whole_device = device->whole_device;
  if (outside) {
    stats_.held = estimate_.follow(*outside);
  } else {
    stats_.held = estimate_.follow_growth(OutsideEstimate::at_least(before, device->bytes, after));
  }
  return outside.has_value();
}

void OutsideWatch::charge(std::size_t wanted) {
  Budget& budget = pool_->budget();
  const std::size_t before = stats().charged;
  if (before > wanted) {
    budget.release(Tag::kOutside, before - wanted);
    set_charged(wanted);
    return;
  }
  std::size_t missing = wanted - before;
  for (int round = 0; missing > 0 && round < kRounds; ++round) {
    const bool hopeless = round > 0 && !pool_->make_room(missing, nullptr);
    missing -= budget.charge_up_to(Tag::kOutside, missing);
    set_charged(wanted - missing);
    if (hopeless) break;
  }
}

void OutsideWatch::set_charged(std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  stats_.charged = nbytes;
}

void OutsideWatch::report_crossing() {
  const OutsideStats seen = stats();
  const bool crossing = seen.charged < seen.held;
  if (crossing && !crossing_) {
    pool_->device()->suppress("the process holds " + format_bytes(seen.held) +
                              " on the device outside of the cap's ledger, of which " +
                              format_bytes(seen.held - seen.charged) +
                              " are beyond the cap, and no room can be made");
  }
  crossing_ = crossing;
}

CapExceededError OutsideWatch::refusal() const {
  const BudgetStats ledger = pool_->budget().stats();
  const std::size_t wanted = stats_.held + stats_.reserve;
  return {
      "the process holds " + format_bytes(stats_.held) +
          " on the device outside of Penstock (its CUDA context, loaded kernels, what libraries "
          "take" +
          (stats_.whole_device ? "; other processes that started since are counted along" : "") +
          "), and " + format_bytes(stats_.reserve) +
          " are kept in reserve for it to grow: the cap of " + format_bytes(ledger.cap) +
          " has no room for that. Raise the cap.",
      wanted, ledger.cap, ledger.used - stats_.charged};
}

}  // namespace penstock
