// What asynchronous copies cost beside their bytes, as measured on an H200 with pinned memory: for
// those who plan copies, and those who issue them.
#pragma once

#include <cstddef>

namespace penstock {

/// What a copy costs however small it is: 64 KiB take 3.6 us where the link's rate alone would be
/// 1.2 us, and 4 MiB 2 us more than their bytes.
inline constexpr double kSecondsPerCopy = 2e-6;

/// From the end of a step to the start of a copy on another stream that waits for its event.
inline constexpr double kSecondsPerWait = 10e-6;

/// Below this a copy is best made for several steps: the copy itself, and what orders it, take some
/// 10 us of the host, and so many bytes 0.3 ms of the link.
inline constexpr std::size_t kLittleCopy = std::size_t{16} << 20;

}  // namespace penstock
