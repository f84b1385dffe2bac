#include <nvtx3/nvToolsExt.h>

#include "device/ranges.hpp"

namespace penstock {

namespace {

nvtxDomainHandle_t domain() noexcept {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("penstock");
  return handle;
}

}  // namespace

std::uint64_t start_range(const char* name) noexcept {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  return nvtxDomainRangeStartEx(domain(), &attributes);
}

void end_range(std::uint64_t range) noexcept {
  nvtxDomainRangeEnd(domain(), range);
}

}  // namespace penstock
