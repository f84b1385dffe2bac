// Byte counts in messages, the same everywhere: a figure for people and the exact number.
#pragma once

#include <cstddef>
#include <string>

namespace penstock {

/// "1.50 GiB (1610612736 bytes)"; below 1 KiB only "12 bytes".
std::string format_bytes(std::size_t nbytes);
/// "0x7f3a40000000".
std::string format_address(const void* address);

}  // namespace penstock
