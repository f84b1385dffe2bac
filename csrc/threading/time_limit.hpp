// Time limits as callers give them, safe to add to a clock's reading.
#pragma once

#include <algorithm>
#include <chrono>

namespace penstock {

/// `limit`, but at most a year: the standard's waits overflow where the largest duration is given.
inline std::chrono::milliseconds at_most_a_year(std::chrono::milliseconds limit) {
  return std::min<std::chrono::milliseconds>(limit, std::chrono::hours(24 * 365));
}

}  // namespace penstock
