// The Python face of the core: one function for each room, called by the module's initializer.
// Names are those of C++. Calls that may wait or do device work release the GIL.
#pragma once

#include <pybind11/pybind11.h>

namespace penstock {

void bind_errors(pybind11::module_& module);
void bind_device(pybind11::module_& module);
void bind_budget(pybind11::module_& module);
void bind_page_table(pybind11::module_& module);
void bind_pager(pybind11::module_& module);
void bind_loader(pybind11::module_& module);

}  // namespace penstock
