// Named ranges on a profiler's timeline (NVTX, in the domain "penstock"): steps, loads, evictions.
// They cost a few nanoseconds where no profiler listens, and are nothing in a build without CUDA.
// Names are not copied where nobody listens; they have to outlive the call only.
#pragma once

#include <cstdint>

namespace penstock {

/// Begins a range that may end on another thread, in any order. @return what ends it.
std::uint64_t start_range(const char* name) noexcept;
void end_range(std::uint64_t range) noexcept;

/// A range as long as the object lives.
class ScopedRange {
 public:
  explicit ScopedRange(const char* name) noexcept : range_(start_range(name)) {}
  ~ScopedRange() { end_range(range_); }
  ScopedRange(const ScopedRange&) = delete;
  ScopedRange& operator=(const ScopedRange&) = delete;

 private:
  std::uint64_t range_;
};

}  // namespace penstock
