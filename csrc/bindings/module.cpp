#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of Penstock.";
  module.attr("__version__") = PENSTOCK_VERSION;
  penstock::bind_errors(module);
  penstock::bind_device(module);
  penstock::bind_budget(module);
  penstock::bind_page_table(module);
  penstock::bind_planner(module);
  penstock::bind_loader(module);
  penstock::bind_host_tier(module);
  penstock::bind_pager(module);
  penstock::bind_frames(module);
  penstock::bind_allocator(module);
  penstock::bind_outside(module);
  penstock::bind_streamer(module);
  penstock::bind_paging(module);
}
