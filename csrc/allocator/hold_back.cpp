#include "allocator/hold_back.hpp"

#include <exception>
#include <utility>

namespace penstock {

HoldBack::HoldBack(std::shared_ptr<Device> device)
    : device_(std::move(device)), events_(device_, Timing::kOff) {}

bool HoldBack::try_record(Block* block, StreamHandle stream) {
  auto& queue = waits_[stream.value];
  try {
    const RelaxedCapture relaxed(*device_);
    if (device_->stream_capturing(stream)) return false;
    queue.push_back({events_.record(stream), block});
    return true;
  } catch (const std::exception& error) {
    device_->suppress(error.what());
    return false;
  }
}

void HoldBack::hold(Block* block, const std::vector<StreamHandle>& streams) {
  block->waits = static_cast<std::uint32_t>(streams.size());
  ++count_;
  for (const StreamHandle stream : streams) {
    if (!try_record(block, stream)) deferred_.push_back({block, stream});
  }
}

bool HoldBack::is_done(const Event& event) noexcept {
  try {
    return device_->event_done(event->get());
  } catch (const std::exception& error) {
    device_->suppress(error.what());
    return false;
  }
}

void HoldBack::retire(std::vector<Block*>& done) {
  if (empty()) return;
  std::vector<Deferred> deferred;
  deferred.swap(deferred_);
  for (const Deferred& wait : deferred) {
    if (!try_record(wait.block, wait.stream)) deferred_.push_back(wait);
  }
  for (auto& [stream, queue] : waits_) {
    while (!queue.empty() && is_done(queue.front().event)) {
      Block* block = queue.front().block;
      queue.pop_front();
      if (--block->waits > 0) continue;
      --count_;
      done.push_back(block);
    }
  }
}

std::vector<Event> HoldBack::pending() const {
  std::vector<Event> events;
  for (const auto& [stream, queue] : waits_) {
    for (const Wait& wait : queue) events.push_back(wait.event);
  }
  return events;
}

}  // namespace penstock
