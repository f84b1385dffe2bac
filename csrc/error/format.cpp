#include "error/format.hpp"

#include <array>
#include <cstdint>
#include <cstdio>

namespace penstock {

std::string format_bytes(std::size_t nbytes) {
  static constexpr std::array<const char*, 5> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (nbytes < 1024) return std::to_string(nbytes) + " bytes";
  double value = static_cast<double>(nbytes) / 1024.0;
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.2f %s (%zu bytes)", value, kUnits[unit], nbytes);
  return text.data();
}

std::string format_address(const void* address) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "0x%zx",
                static_cast<std::size_t>(reinterpret_cast<std::uintptr_t>(address)));
  return text.data();
}

}  // namespace penstock
