#include "device/event_pool.hpp"

#include <exception>
#include <utility>

namespace penstock {

bool wait_until_over(Device& device, const Event& event) {
  try {
    device.event_synchronize(event->get());
    return true;
  } catch (const std::exception& error) {
    if (!device.event_done(event->get())) throw;
    device.suppress(error.what());
    return false;
  }
}

EventPool::EventPool(std::shared_ptr<Device> device, Timing timing)
    : device_(std::move(device)), timing_(timing) {}

Event EventPool::take() {
  std::unique_ptr<OwnedEvent> event;
  {
    const std::lock_guard lock(free_->mutex);
    if (!free_->events.empty()) {
      event = std::move(free_->events.back());
      free_->events.pop_back();
    } else {
      free_->events.reserve(free_->events.capacity() + 1);  // so that giving back cannot fail
    }
  }
  if (!event) event = std::make_unique<OwnedEvent>(device_, timing_);
  return Event(event.release(), [free = free_](OwnedEvent* back) {
    std::unique_ptr<OwnedEvent> owned(back);
    const std::lock_guard lock(free->mutex);
    if (free->events.size() < free->events.capacity()) free->events.push_back(std::move(owned));
  });
}

Event EventPool::record(StreamHandle stream) {
  Event event = take();
  device_->event_record(event->get(), stream);
  return event;
}

}  // namespace penstock
