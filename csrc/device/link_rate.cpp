#include "device/link_rate.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace penstock {

namespace {

// Undoes the steps of a measurement in reverse order, whichever of them it came to.
class Cleanup {
 public:
  explicit Cleanup(Device& device) : device_(device) {}
  ~Cleanup() {
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      try {
        (*step)();
      } catch (const std::exception& error) {
        device_.suppress(error.what());
      }
    }
  }
  Cleanup(const Cleanup&) = delete;
  Cleanup& operator=(const Cleanup&) = delete;
  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }

 private:
  Device& device_;
  std::vector<std::function<void()>> steps_;
};

}  // namespace

double measure_link_rate(Device& device, std::size_t nbytes, int repeats) {
  const std::size_t granularity = device.info().frame_granularity;
  if (nbytes == 0 || repeats < 1) throw std::invalid_argument("nothing to measure");
  const std::size_t size = (nbytes + granularity - 1) / granularity * granularity;

  Cleanup cleanup(device);
  void* source = device.pinned_allocate(size);
  cleanup.add([&, source] { device.pinned_free(source, size); });
  std::memset(source, 1, size);
  const FrameHandle frame = device.frame_create(size);
  cleanup.add([&, frame] { device.frame_release(frame); });
  void* target = device.address_reserve(size);
  cleanup.add([&, target] { device.address_release(target, size); });
  device.map(target, frame, size);
  cleanup.add([&, target] { device.unmap(target, size); });
  const StreamHandle stream = device.stream_create();
  cleanup.add([&, stream] { device.stream_destroy(stream); });

  std::vector<double> seconds;
  for (int i = 0; i <= repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    device.copy(target, source, size, stream);
    device.stream_synchronize(stream);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    if (i > 0) seconds.push_back(taken.count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  return static_cast<double>(size) / seconds[static_cast<std::size_t>(repeats / 2)];
}

}  // namespace penstock
