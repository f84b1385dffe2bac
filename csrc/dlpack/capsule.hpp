// Zero-copy tensors on pager memory cross into Python as DLPack capsules: flat arrays of bytes,
// which the receiving framework views as the dtype and shape it wants. That way one build serves
// every version of every framework, for every dtype. The capsule, and then the tensor made of it,
// keeps the region alive; its deleter needs neither the GIL nor Python. The layout is that of
// DLPack 0.x, https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <memory>

#include "region/region.hpp"

namespace penstock {

/// A capsule named "dltensor" over `nbytes` at `offset` of `region`, as unsigned bytes on its
/// device.
/// @throws std::out_of_range outside the region, std::invalid_argument for no bytes at all.
/// @param owner  Kept alive, too.
pybind11::capsule to_dlpack(std::shared_ptr<Region> region, std::size_t offset, std::size_t nbytes,
                            std::shared_ptr<void> owner = nullptr);

}  // namespace penstock
