#include "budget/budget.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error/error.hpp"
#include "error/format.hpp"
#include "threading/time_limit.hpp"

namespace penstock {

namespace {

constexpr std::array<const char*, kTagCount> kTagNames = {"weights", "activations", "workspace",
                                                          "cache", "outside"};

std::string refusal(const BudgetStats& stats, std::size_t nbytes) {
  std::string text = "cannot charge " + format_bytes(nbytes) + ": the cap is " +
                     format_bytes(stats.cap) + " and " + format_bytes(stats.used) + " are in use";
  for (std::size_t i = 0; i < kTagCount; ++i) {
    if (stats.used_by_tag[i] == 0) continue;
    text += std::string(", ") + kTagNames[i] + " " + format_bytes(stats.used_by_tag[i]);
  }
  return text + ". Raise the cap, or release something first.";
}

}  // namespace

const char* tag_name(Tag tag) noexcept {
  return kTagNames[static_cast<std::size_t>(tag)];
}

Budget::Budget(std::size_t cap) {
  stats_.cap = cap;
}

void Budget::add(Tag tag, std::size_t nbytes) {
  const auto i = static_cast<std::size_t>(tag);
  stats_.used += nbytes;
  stats_.used_by_tag[i] += nbytes;
  stats_.charged += nbytes;
  ++stats_.version;
  stats_.peak = std::max(stats_.peak, stats_.used);
  stats_.peak_by_tag[i] = std::max(stats_.peak_by_tag[i], stats_.used_by_tag[i]);
}

bool Budget::try_charge(Tag tag, std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  if (!fits(nbytes)) {
    ++stats_.refused;
    return false;
  }
  add(tag, nbytes);
  return true;
}

bool Budget::charge_within(Tag tag, std::size_t nbytes, std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  if (!released_.wait_for(lock, at_most_a_year(limit), [&] { return fits(nbytes); })) {
    ++stats_.refused;
    return false;
  }
  add(tag, nbytes);
  return true;
}

void Budget::charge(Tag tag, std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  if (!fits(nbytes)) {
    ++stats_.refused;
    throw CapExceededError(refusal(stats_, nbytes), nbytes, stats_.cap, stats_.used);
  }
  add(tag, nbytes);
}

std::size_t Budget::charge_up_to(Tag tag, std::size_t nbytes) {
  const std::lock_guard lock(mutex_);
  const std::size_t fitting = std::min(nbytes, stats_.cap - stats_.used);
  if (fitting > 0) add(tag, fitting);
  return fitting;
}

void Budget::release(Tag tag, std::size_t nbytes) {
  {
    const std::lock_guard lock(mutex_);
    const auto i = static_cast<std::size_t>(tag);
    if (nbytes > stats_.used_by_tag[i]) {
      throw std::logic_error("budget: releasing " + format_bytes(nbytes) + " of " + kTagNames[i] +
                             ", which holds " + format_bytes(stats_.used_by_tag[i]));
    }
    stats_.used -= nbytes;
    stats_.used_by_tag[i] -= nbytes;
    ++stats_.version;
  }
  released_.notify_all();
}

bool Budget::try_set_cap(std::size_t cap) {
  {
    const std::lock_guard lock(mutex_);
    if (stats_.used > cap) return false;
    stats_.cap = cap;
  }
  released_.notify_all();
  return true;
}

std::size_t Budget::cap() const {
  const std::lock_guard lock(mutex_);
  return stats_.cap;
}

std::size_t Budget::available() const {
  const std::lock_guard lock(mutex_);
  return stats_.cap - stats_.used;
}

BudgetStats Budget::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Budget::reset_peaks() {
  const std::lock_guard lock(mutex_);
  stats_.peak = stats_.used;
  stats_.peak_by_tag = stats_.used_by_tag;
}

}  // namespace penstock
