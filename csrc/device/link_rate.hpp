// The link rate: what the path from pinned host memory to the device carries, measured the same way
// wherever a figure is compared with it.
#pragma once

#include <cstddef>

#include "device/device.hpp"

namespace penstock {

/// Copies `nbytes` from pinned memory to frames `repeats` times, after one copy to warm up.
/// @return bytes per second of the median copy, by the host's clock around copy and wait.
double measure_link_rate(Device& device, std::size_t nbytes, int repeats);

}  // namespace penstock
