// The Python face of the core: one function for each room, called by the module's initializer.
// Names are those of C++. Calls that may wait or do device work release the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "device/device.hpp"

namespace penstock {

/// Streams cross as integers, the way torch.cuda.Stream.cuda_stream gives them.
inline StreamHandle stream_of(std::uintptr_t stream) {
  return {reinterpret_cast<void*>(stream)};
}

/// Bytes of a buffer. @throws std::invalid_argument for one with gaps.
inline std::size_t contiguous_bytes(const pybind11::buffer_info& bytes) {
  if (PyBuffer_IsContiguous(bytes.view(), 'C') == 0) {
    throw std::invalid_argument("write: the buffer is not contiguous");
  }
  return static_cast<std::size_t>(bytes.size) * static_cast<std::size_t>(bytes.itemsize);
}

void bind_errors(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_budget(pybind11::module_& module);
void bind_page_table(pybind11::module_& module);
void bind_planner(pybind11::module_& module);
void bind_host_tier(pybind11::module_& module);
void bind_pager(pybind11::module_& module);
void bind_frames(pybind11::module_& module);
void bind_allocator(pybind11::module_& module);
void bind_outside(pybind11::module_& module);
void bind_streamer(pybind11::module_& module);
void bind_paging(pybind11::module_& module);
void bind_loader(pybind11::module_& module);

}  // namespace penstock
