// The device that tests rely on to make others fail.
#include "device/testing/faulty_device.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>

#include "device/handles.hpp"
#include "device/host/host_device.hpp"
#include "error/error.hpp"
#include "support/files.hpp"

namespace penstock {
namespace {

using namespace testing;

struct FaultyDeviceTest : ::testing::Test {
  std::shared_ptr<FaultyDevice> device =
      std::make_shared<FaultyDevice>(std::make_shared<HostDevice>());
};

TEST_F(FaultyDeviceTest, CountsCallsByName) {
  {
    const OwnedStream stream(device);
    device->stream_synchronize(stream.get());
    device->stream_synchronize(stream.get());
  }
  auto calls = device->calls();
  EXPECT_EQ(calls["stream_create"], 1U);
  EXPECT_EQ(calls["stream_synchronize"], 2U);
  EXPECT_EQ(calls["stream_destroy"], 1U);
  EXPECT_EQ(calls["event_create"], 0U);
  device->reset();
  EXPECT_TRUE(device->calls().empty());
}

TEST_F(FaultyDeviceTest, FailsTheNthCallOfAnyFunctionOnce) {
  device->fail_nth_call(2);
  const StreamHandle stream = device->stream_create();
  device->stream_synchronize(stream);
  EXPECT_FALSE(device->fired());
  try {
    device->stream_synchronize(stream);
    ADD_FAILURE() << "it did not fail";
  } catch (const DeviceError& error) {
    EXPECT_EQ(error.call, "stream_synchronize");
  }
  EXPECT_TRUE(device->fired());
  EXPECT_NO_THROW(device->stream_synchronize(stream));
  device->stream_destroy(stream);
}

TEST_F(FaultyDeviceTest, FailsTheNthCallOfOneFunctionAndLetsOthersPass) {
  device->fail_nth_call_of("event_create", 1);
  const OwnedEvent first(device);
  const OwnedStream stream(device);
  EXPECT_THROW(device->event_create(Timing::kOff), DeviceError);
  const OwnedEvent second(device);
}

TEST_F(FaultyDeviceTest, ResetForgetsTheFault) {
  device->fail_nth_call(0);
  device->reset();
  EXPECT_NO_THROW(const OwnedStream stream(device));
  EXPECT_FALSE(device->fired());
}

TEST_F(FaultyDeviceTest, TellsOfMemoryBesideItsFrames) {
  EXPECT_FALSE(device->process_memory());
  const std::size_t nbytes = device->info().frame_granularity;
  const FrameHandle frame = device->frame_create(nbytes);
  device->set_outside(5, true);
  EXPECT_EQ(device->process_memory()->bytes, nbytes + 5);
  EXPECT_TRUE(device->process_memory()->whole_device);
  device->frame_release(frame);
  EXPECT_EQ(device->process_memory()->bytes, 5U);
  device->fail_nth_call_of("process_memory", 0);
  EXPECT_THROW(device->process_memory(), DeviceError);
}

TEST_F(FaultyDeviceTest, FailedWriteIsNotPassedOn) {
  auto* range = static_cast<unsigned char*>(device->managed_reserve(4096, Access::kReadWrite));
  const Bytes bytes(100, 1);
  device->fail_nth_call_of("managed_write", 0);
  EXPECT_THROW(device->managed_write(range, bytes.data(), 100), DeviceError);
  EXPECT_EQ(Bytes(range, range + 100), Bytes(100, 0));
  device->managed_release(range, 4096);
}

TEST_F(FaultyDeviceTest, FailedReleaseHasGivenTheHandleBack) {
  void* range = device->managed_reserve(4096, Access::kReadWrite);
  device->fail_nth_call_of("managed_release", 0);
  EXPECT_THROW(device->managed_release(range, 4096), DeviceError);
  EXPECT_THROW(device->managed_release(range, 4096), std::invalid_argument);
}

TEST_F(FaultyDeviceTest, DestructorsOfOwnersPutFailuresOnRecord) {
  {
    const OwnedEvent event(device);
    device->fail_nth_call_of("event_destroy", 0);
  }
  EXPECT_EQ(device->suppressed_count(), 1U);
  EXPECT_NE(device->last_suppressed().find("event_destroy"), std::string::npos);
}

TEST_F(FaultyDeviceTest, DelaysCallsOfOneFunction) {
  const OwnedEvent event(device);
  device->delay_calls_of("event_done", std::chrono::milliseconds(20));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(device->event_done(event.get()));
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(20));
}

}  // namespace
}  // namespace penstock
