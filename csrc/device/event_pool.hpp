// Events that are used over and over: making one costs more than recording it, and a streaming pass
// needs hundreds. An event goes back to the pool when its last holder lets go of it; the pool may
// go first. Thread-safe.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "device/handles.hpp"

namespace penstock {

using Event = std::shared_ptr<OwnedEvent>;

/// Blocks until the work before an event is over, whether or not that succeeded: work that failed
/// uses nothing any more, and its error goes on record. @return whether it succeeded.
/// @throws DeviceError where it was the wait that failed.
bool wait_until_over(Device& device, const Event& event);

class EventPool {
 public:
  EventPool(std::shared_ptr<Device> device, Timing timing);

  /// An event whose earlier record nobody looks at any more.
  Event take();
  /// Takes an event and records it on `stream`.
  Event record(StreamHandle stream);

 private:
  struct Free {
    std::mutex mutex;
    std::vector<std::unique_ptr<OwnedEvent>> events;
  };

  std::shared_ptr<Device> device_;
  Timing timing_;
  std::shared_ptr<Free> free_ = std::make_shared<Free>();
};

}  // namespace penstock
