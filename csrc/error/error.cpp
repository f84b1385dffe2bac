#include "error/error.hpp"

#include <cstring>

namespace penstock {

DeviceError::DeviceError(const std::string& call_name, int error_code, const std::string& detail)
    : Error(call_name + " failed: " + detail +
            (error_code == 0 ? "" : " (code " + std::to_string(error_code) + ")")),
      call(call_name),
      code(error_code) {}

DeviceError system_error(const std::string& call, int saved_errno) {
  return DeviceError(call, saved_errno, std::strerror(saved_errno));
}

}  // namespace penstock
