// Devices by name.
#include "device/open/open_device.hpp"

#include <gtest/gtest.h>

#include <string>

#include "error/error.hpp"

namespace penstock {
namespace {

TEST(OpenDevice, TheHostIsAlwaysThere) {
  EXPECT_EQ(open_device("cpu")->info().kind, DeviceKind::kHost);
}

TEST(OpenDevice, UnknownNamesAreRefusedWithTheKnownOnes) {
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda: 1", "CUDA", "cpu:0",
                           "cuda:99999999999999999999"}) {
    try {
      open_device(name);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("\"cuda:N\""), std::string::npos);
    }
  }
}

TEST(OpenDevice, DeviceThatIsNotThereIsRefusedWithTheReason) {
  const int count = cuda_device_count();
  EXPECT_GE(count, 0);
  EXPECT_EQ(no_cuda_reason().empty(), count > 0);
  EXPECT_TRUE(built_with_cuda() || count == 0);
  try {
    open_device("cuda:999");
    FAIL() << "there are 1000 GPUs";
  } catch (const DeviceError& error) {
    const std::string reason = count == 0 ? no_cuda_reason() : std::to_string(count);
    EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
  }
}

TEST(OpenDevice, EveryGpuOpens) {
  const int count = cuda_device_count();
  if (count == 0) GTEST_SKIP() << no_cuda_reason();
  for (int i = 0; i < count; ++i) {
    const DeviceInfo info = open_device("cuda:" + std::to_string(i))->info();
    EXPECT_EQ(info.kind, DeviceKind::kCuda);
    EXPECT_EQ(info.ordinal, i);
  }
  EXPECT_EQ(open_device("cuda")->info().ordinal, 0);
}

}  // namespace
}  // namespace penstock
