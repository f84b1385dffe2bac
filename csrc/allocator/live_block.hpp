// What is told of a block that somebody has. Plain data, copied out under the lock of its owner.
#pragma once

#include <cstddef>
#include <cstdint>

#include "allocator/heap.hpp"

namespace penstock {

struct LiveBlock {
  void* address = nullptr;
  std::size_t nbytes = 0;
  std::size_t requested = 0;
  StreamHandle stream;
  std::uint64_t sequence = 0;  ///< Grows with time.
  PoolId pool;                 ///< Zeros: the common pool.
};

}  // namespace penstock
