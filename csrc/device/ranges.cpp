#include "device/ranges.hpp"

namespace penstock {

std::uint64_t start_range(const char* /*name*/) noexcept {
  return 0;
}

void end_range(std::uint64_t /*range*/) noexcept {}

}  // namespace penstock
