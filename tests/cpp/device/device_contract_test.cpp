// What every device promises, whatever it is made of. It is written so that it holds on a GPU:
// device memory is only touched by Device::copy, and sizes are multiples of the device's own
// granularity.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "device/handles.hpp"
#include "device/host/host_device.hpp"
#include "device/link_rate.hpp"
#include "device/open/open_device.hpp"
#include "device/testing/faulty_device.hpp"
#include "error/error.hpp"
#include "io/file.hpp"
#include "support/files.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr std::size_t kUnit = std::size_t{2} << 20;  // what the system may map as one
constexpr StreamHandle kNull{};

class Pinned {
 public:
  Pinned(Device& device, std::size_t nbytes)
      : device_(device),
        nbytes_(nbytes),
        address_(static_cast<unsigned char*>(device.pinned_allocate(nbytes))) {}
  ~Pinned() { device_.pinned_free(address_, nbytes_); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  unsigned char* address() const { return address_; }
  void write(const Bytes& bytes) const { std::memcpy(address_, bytes.data(), bytes.size()); }
  Bytes bytes() const { return Bytes(address_, address_ + nbytes_); }

 private:
  Device& device_;
  std::size_t nbytes_;
  unsigned char* address_;
};

class DeviceContract : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const std::string name = GetParam();
    if (name == "Cuda" && cuda_device_count() == 0) GTEST_SKIP() << no_cuda_reason();
    device_ = open_device(name == "Cuda" ? "cuda" : "cpu");
    if (name == "Faulty") device_ = std::make_shared<FaultyDevice>(device_);
    granularity_ = device_->info().frame_granularity;
  }

  /// The bytes at an address, as the device reads them.
  Bytes read(const void* address, std::size_t nbytes) {
    const Pinned target(*device_, nbytes);
    const OwnedStream stream(device_);
    device_->copy(target.address(), address, nbytes, stream.get());
    device_->stream_synchronize(stream.get());
    return target.bytes();
  }
  void write(void* address, const Bytes& bytes) {
    const Pinned source(*device_, bytes.size());
    source.write(bytes);
    const OwnedStream stream(device_);
    device_->copy(address, source.address(), bytes.size(), stream.get());
    device_->stream_synchronize(stream.get());
  }

  std::shared_ptr<Device> device_;
  std::size_t granularity_ = 0;
};

TEST_P(DeviceContract, SaysWhatItIs) {
  const DeviceInfo info = device_->info();
  EXPECT_FALSE(info.name.empty());
  EXPECT_EQ(info.kind == DeviceKind::kCuda, std::string(GetParam()) == "Cuda");
  EXPECT_GT(granularity_, 0U);
  EXPECT_EQ(granularity_ & (granularity_ - 1), 0U);
  const MemoryInfo memory = device_->memory_info();
  EXPECT_GT(memory.free_bytes, 0U);
  EXPECT_LE(memory.free_bytes, memory.total_bytes);
  EXPECT_LE(memory.total_bytes, info.total_bytes * 2);
  EXPECT_GE(memory.total_bytes * 2, info.total_bytes);
}

// ---- streams and events ------------------------------------------------------------------------

TEST_P(DeviceContract, EventOrdersOneStreamAfterAnother) {
  const std::size_t nbytes = 4 * kUnit;
  const Bytes right = pattern(nbytes, 1);
  const Pinned wrong_source(*device_, nbytes);
  const Pinned right_source(*device_, nbytes);
  const Pinned middle(*device_, nbytes);
  const Pinned target(*device_, nbytes);
  right_source.write(right);
  wrong_source.write(pattern(nbytes, 2));
  const OwnedStream first(device_);
  const OwnedStream second(device_);
  const OwnedEvent written(device_);
  for (int i = 0; i < 10; ++i) {
    device_->copy(middle.address(), wrong_source.address(), nbytes, first.get());
  }
  device_->copy(middle.address(), right_source.address(), nbytes, first.get());
  device_->event_record(written.get(), first.get());
  device_->event_wait(second.get(), written.get());
  device_->copy(target.address(), middle.address(), nbytes, second.get());
  device_->stream_synchronize(second.get());
  EXPECT_EQ(target.bytes(), right);
  EXPECT_TRUE(device_->event_done(written.get()));
  device_->event_synchronize(written.get());
}

TEST_P(DeviceContract, EventRecordedAgainStandsForTheLaterWork) {
  const std::size_t nbytes = 4 * kUnit;
  const Pinned source(*device_, nbytes);
  const Pinned target(*device_, nbytes);
  source.write(pattern(nbytes, 1));
  const OwnedStream stream(device_);
  const OwnedEvent event(device_);
  device_->event_record(event.get(), stream.get());
  device_->copy(target.address(), source.address(), nbytes, stream.get());
  device_->event_record(event.get(), stream.get());
  device_->event_synchronize(event.get());
  EXPECT_EQ(target.bytes(), source.bytes());
}

TEST_P(DeviceContract, EventThatWasNeverRecordedIsDone) {
  const OwnedStream stream(device_);
  const OwnedEvent event(device_);
  EXPECT_TRUE(device_->event_done(event.get()));
  device_->event_synchronize(event.get());
  device_->event_wait(stream.get(), event.get());
  device_->stream_synchronize(stream.get());
}

TEST_P(DeviceContract, SynchronizeWaitsForAllStreams) {
  const std::size_t nbytes = 4 * kUnit;
  const Bytes bytes = pattern(nbytes, 1);
  const Pinned source(*device_, nbytes);
  const Pinned first_target(*device_, nbytes);
  const Pinned second_target(*device_, nbytes);
  source.write(bytes);
  const OwnedStream first(device_);
  const OwnedStream second(device_);
  device_->copy(first_target.address(), source.address(), nbytes, first.get());
  device_->copy(second_target.address(), source.address(), nbytes, second.get());
  device_->synchronize();
  EXPECT_EQ(first_target.bytes(), bytes);
  EXPECT_EQ(second_target.bytes(), bytes);
}

TEST_P(DeviceContract, NothingCapturesUnlessToldTo) {
  const OwnedStream stream(device_);
  EXPECT_FALSE(device_->stream_capturing(stream.get()));
  EXPECT_FALSE(device_->stream_capturing(kNull));
  const RelaxedCapture relaxed(*device_);
  EXPECT_FALSE(device_->stream_capturing(stream.get()));
}

TEST_P(DeviceContract, NullStreamIsAnOrderOfItsOwn) {
  const Bytes bytes = pattern(kUnit, 1);
  const Pinned source(*device_, kUnit);
  const Pinned middle(*device_, kUnit);
  const Pinned target(*device_, kUnit);
  source.write(bytes);
  const OwnedStream stream(device_);
  const OwnedEvent there(device_);
  const OwnedEvent back(device_);
  device_->copy(middle.address(), source.address(), kUnit, stream.get());
  device_->event_record(there.get(), stream.get());
  device_->event_wait(kNull, there.get());
  device_->copy(target.address(), middle.address(), kUnit, kNull);
  device_->event_record(back.get(), kNull);
  device_->event_synchronize(back.get());
  EXPECT_EQ(target.bytes(), bytes);
  device_->stream_synchronize(kNull);
}

TEST_P(DeviceContract, PinnedMemoryOfAnySizeCopies) {
  for (const std::size_t nbytes : {std::size_t{1}, std::size_t{4097}, kUnit + 3}) {
    const Pinned source(*device_, nbytes);
    const Pinned target(*device_, nbytes);
    source.write(pattern(nbytes, nbytes));
    const OwnedStream stream(device_);
    device_->copy(target.address(), source.address(), nbytes, stream.get());
    device_->stream_synchronize(stream.get());
    EXPECT_EQ(target.bytes(), source.bytes());
  }
}

// ---- managed memory ----------------------------------------------------------------------------

class Managed : public DeviceContract {
 protected:
  void SetUp() override {
    DeviceContract::SetUp();
    if (device_ == nullptr) return;
    const std::string reason = device_->info().no_managed_reason;
    if (!reason.empty()) GTEST_SKIP() << reason;
    stream_ = std::make_unique<OwnedStream>(device_);
  }
  void TearDown() override { stream_.reset(); }

  void fill(ManagedRange& range, const Bytes& bytes) {
    device_->managed_write(range.address(), bytes.data(), bytes.size());
    if (range.access() == Access::kReadMostly) {
      device_->managed_seal(range.address(), range.nbytes());
    }
  }
  void prefetch(const ManagedRange& range, std::size_t offset, std::size_t nbytes) {
    device_->managed_prefetch(range.address() + offset, nbytes, stream_->get());
    device_->stream_synchronize(stream_->get());
  }
  void evict(const ManagedRange& range, std::size_t offset, std::size_t nbytes) {
    device_->managed_evict(range.address() + offset, nbytes, range.access(), stream_->get());
    device_->stream_synchronize(stream_->get());
  }
  void expect_resident(const ManagedRange& range, std::size_t nbytes) {
    const auto resident = device_->managed_resident(range.address(), range.nbytes());
    EXPECT_EQ(resident.value_or(nbytes), nbytes);  // a GPU cannot tell
  }

  std::unique_ptr<OwnedStream> stream_;
};

constexpr std::array<Access, 2> kAccesses = {Access::kReadMostly, Access::kReadWrite};

TEST_P(Managed, MemoryThatStaysOnTheHostIsWrittenAndReadByTheDevice) {
  ManagedRange range(device_, 2 * kUnit, Access::kReadWrite);
  device_->managed_stay(range.address(), range.nbytes());
  device_->fill(range.address(), 7, kUnit, stream_->get());
  device_->copy(range.address() + kUnit, range.address(), kUnit, stream_->get());
  device_->stream_synchronize(stream_->get());
  for (const std::size_t at : {std::size_t{0}, kUnit - 1, kUnit, 2 * kUnit - 1}) {
    EXPECT_EQ(std::to_integer<int>(range.address()[at]), 7) << at;
  }
}

TEST_P(Managed, BytesStayThroughPrefetchAndEvictAndAreCounted) {
  const Bytes bytes = pattern(4 * kUnit, 1);
  for (const Access access : kAccesses) {
    ManagedRange range(device_, bytes.size(), access);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(range.address()) % kUnit, 0U);
    expect_resident(range, 0);
    fill(range, bytes);
    expect_resident(range, 0);
    prefetch(range, kUnit, 2 * kUnit);
    expect_resident(range, 2 * kUnit);
    evict(range, kUnit, kUnit);
    expect_resident(range, kUnit);
    prefetch(range, 0, 4 * kUnit);
    expect_resident(range, 4 * kUnit);
    EXPECT_EQ(read(range.address(), bytes.size()), bytes);
    evict(range, 0, 4 * kUnit);
    expect_resident(range, 0);
    EXPECT_EQ(read(range.address(), bytes.size()), bytes);
  }
}

TEST_P(Managed, WhatIsWrittenAfterAPrefetchOutlivesTheEviction) {
  for (const Access access : kAccesses) {
    Bytes bytes = pattern(2 * kUnit, 1);
    ManagedRange range(device_, bytes.size(), access);
    fill(range, bytes);
    prefetch(range, 0, bytes.size());
    const Bytes update = pattern(1000, 2);
    std::copy(update.begin(), update.end(),
              reinterpret_cast<unsigned char*>(range.address()) + 5000);
    std::copy(update.begin(), update.end(), bytes.begin() + 5000);
    EXPECT_EQ(read(range.address(), bytes.size()), bytes);
    if (access == Access::kReadWrite) {
      const Bytes step = pattern(kUnit, 3);  // as an optimizer writes: on the device
      write(range.address() + kUnit, step);
      std::copy(step.begin(), step.end(), bytes.begin() + static_cast<std::ptrdiff_t>(kUnit));
    }
    evict(range, 0, bytes.size());
    EXPECT_EQ(read(range.address(), bytes.size()), bytes);
  }
}

TEST_P(Managed, WhatTheDeviceWritesToAReadMostlyRangeIsKeptOnRequest) {
  Bytes bytes = pattern(3 * Device::kManagedBlock + kUnit, 1);
  ManagedRange range(device_, bytes.size(), Access::kReadMostly);
  fill(range, bytes);
  prefetch(range, 0, bytes.size());
  for (const std::size_t at : {std::size_t{0}, 2 * Device::kManagedBlock}) {
    device_->fill(range.address() + at, 7, kUnit, stream_->get());
    std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(at), kUnit, 7);
    device_->managed_keep(range.address() + at, Device::kManagedBlock, stream_->get());
    EXPECT_EQ(read(range.address(), bytes.size()), bytes);
  }
  evict(range, 0, bytes.size());
  EXPECT_EQ(read(range.address(), bytes.size()), bytes);
  prefetch(range, 0, bytes.size());
  EXPECT_EQ(read(range.address(), bytes.size()), bytes);
}

TEST_P(Managed, FileIsReadToAnyPlaceFromAnyOffset) {
  const TemporaryDirectory directory;
  const Bytes content = pattern(3 * kUnit, 1);
  const File file(directory.write("weights", content));
  ManagedRange range(device_, 2 * kUnit, Access::kReadMostly);
  const Bytes background(2 * kUnit, 0xAA);
  device_->managed_write(range.address(), background.data(), background.size());
  device_->managed_read(range.address() + 13, file, 4099, kUnit + 7);
  Bytes expected = background;
  std::copy_n(content.begin() + 4099, kUnit + 7, expected.begin() + 13);
  expect_resident(range, 0);
  EXPECT_EQ(read(range.address(), expected.size()), expected);
  device_->managed_read(range.address(), file, content.size(), 0);  // nothing is nothing
}

TEST_P(Managed, FileThatIsTooShortIsNamedWithItsEnd) {
  const TemporaryDirectory directory;
  const std::string path = directory.write("weights", pattern(100, 1));
  const File file(path);
  const ManagedRange range(device_, kUnit, Access::kReadMostly);
  try {
    device_->managed_read(range.address(), file, 40, 61);
    FAIL() << "read past the end";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.path, path);
    EXPECT_EQ(error.offset, 100U);
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos);
  }
  EXPECT_THROW(device_->managed_read(range.address(), file, 1000, 1), CheckpointError);
}

TEST_P(Managed, ImpossibleSizesAreRefused) {
  for (const std::size_t nbytes :
       {std::size_t{0}, ~std::size_t{0}, ~std::size_t{0} - 5000, std::size_t{1} << 62}) {
    EXPECT_THROW(device_->managed_reserve(nbytes, Access::kReadMostly), std::exception) << nbytes;
  }
}

// ---- frames ------------------------------------------------------------------------------------

class Frames : public DeviceContract {
 protected:
  void SetUp() override {
    DeviceContract::SetUp();
    if (device_ == nullptr) return;
    addresses_ = static_cast<std::byte*>(device_->address_reserve(kSlots * granularity_));
  }
  void TearDown() override {
    if (addresses_ == nullptr) return;
    device_->address_release(addresses_, kSlots * granularity_);
  }
  std::byte* slot(std::size_t i) const { return addresses_ + i * granularity_; }

  static constexpr std::size_t kSlots = 4;
  std::byte* addresses_ = nullptr;
};

TEST_P(Frames, TwoAddressesOnOneFrameSeeTheSameBytes) {
  const FrameHandle frame = device_->frame_create(granularity_);
  device_->map(slot(0), frame, granularity_);
  device_->map(slot(2), frame, granularity_);
  for (std::size_t seed = 0; seed < 2; ++seed) {
    const Bytes bytes = pattern(granularity_, seed);
    write(slot(seed == 0 ? 0 : 2), bytes);
    EXPECT_EQ(read(slot(seed == 0 ? 2 : 0), granularity_), bytes);
  }
  device_->unmap(slot(0), granularity_);
  EXPECT_EQ(read(slot(2), granularity_), pattern(granularity_, 1));  // the other one stays
  device_->unmap(slot(2), granularity_);
  device_->frame_release(frame);
}

TEST_P(Frames, DifferentFramesDoNotShareBytesAndAddressesCanChangeFrames) {
  const FrameHandle first = device_->frame_create(granularity_);
  const FrameHandle second = device_->frame_create(granularity_);
  device_->map(slot(0), first, granularity_);
  device_->map(slot(1), second, granularity_);
  write(slot(0), pattern(granularity_, 1));
  write(slot(1), pattern(granularity_, 2));
  EXPECT_EQ(read(slot(0), granularity_), pattern(granularity_, 1));
  device_->unmap(slot(0), granularity_);
  device_->map(slot(0), second, granularity_);
  EXPECT_EQ(read(slot(0), granularity_), pattern(granularity_, 2));
  device_->unmap(slot(0), granularity_);
  device_->map(slot(0), first, granularity_);
  EXPECT_EQ(read(slot(0), granularity_), pattern(granularity_, 1));  // it kept its bytes
  device_->unmap(slot(0), granularity_);
  device_->unmap(slot(1), granularity_);
  device_->frame_release(first);
  device_->frame_release(second);
}

TEST_P(Frames, CopiesCrossTheBordersOfFrames) {
  const FrameHandle large = device_->frame_create(2 * granularity_);
  const FrameHandle small = device_->frame_create(granularity_);
  device_->map(slot(1), large, 2 * granularity_);
  device_->map(slot(0), small, granularity_);
  const Bytes bytes = pattern(3 * granularity_, 1);
  write(slot(0), bytes);
  EXPECT_EQ(read(slot(0), bytes.size()), bytes);
  EXPECT_EQ(read(slot(0) + granularity_ / 2, granularity_),
            Bytes(bytes.begin() + static_cast<std::ptrdiff_t>(granularity_ / 2),
                  bytes.begin() + static_cast<std::ptrdiff_t>(granularity_ / 2 + granularity_)));
  device_->unmap(slot(0), granularity_);
  device_->unmap(slot(1), 2 * granularity_);
  device_->frame_release(small);
  device_->frame_release(large);
}

TEST_P(Frames, ReleasedFramesMakeRoomForNewOnes) {
  for (int i = 0; i < 50; ++i) {
    const FrameHandle first = device_->frame_create(granularity_);
    const FrameHandle second = device_->frame_create(2 * granularity_);
    device_->map(slot(0), first, granularity_);
    device_->map(slot(1), second, 2 * granularity_);
    write(slot(0), pattern(granularity_, 1));
    write(slot(1), pattern(2 * granularity_, 2));
    ASSERT_EQ(read(slot(0), granularity_), pattern(granularity_, 1));
    device_->unmap(slot(0), granularity_);
    device_->unmap(slot(1), 2 * granularity_);
    device_->frame_release(first);
    device_->frame_release(second);
  }
}

TEST_P(Frames, BadSizesAreRefused) {
  for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, granularity_ + 1}) {
    EXPECT_THROW(device_->frame_create(nbytes), std::exception) << nbytes;
    EXPECT_THROW(device_->address_reserve(nbytes), std::exception) << nbytes;
  }
  EXPECT_THROW(device_->address_reserve(std::size_t{1} << 60), DeviceError);
  const FrameHandle frame = device_->frame_create(2 * granularity_);
  EXPECT_THROW(device_->map(slot(0), frame, granularity_), std::exception);  // mapped whole only
  device_->map(slot(0), frame, 2 * granularity_);
  device_->unmap(slot(0), 2 * granularity_);
  device_->frame_release(frame);
}

TEST_P(Frames, ProcessMemoryHasTheFramesInItWhereItIsKnown) {
  const auto before = device_->process_memory();
  if (!before) GTEST_SKIP() << "this device cannot tell";
  EXPECT_GT(before->bytes, 0U);  // a context
  const std::size_t nbytes = 256 * granularity_;
  const FrameHandle frame = device_->frame_create(nbytes);
  EXPECT_GE(device_->process_memory()->bytes, before->bytes + nbytes);
  device_->frame_release(frame);
}

// ---- the link ----------------------------------------------------------------------------------

TEST_P(DeviceContract, LinkRateIsThatOfSomeMemory) {
  const double rate = measure_link_rate(*device_, 16 * kUnit, 3);
  EXPECT_GT(rate, 1e8);
  EXPECT_LT(rate, 1e13);
  EXPECT_GT(measure_link_rate(*device_, 1, 1), 0.0);
  EXPECT_EQ(device_->suppressed_count(), 0U);
  EXPECT_THROW(measure_link_rate(*device_, 0, 1), std::invalid_argument);
  EXPECT_THROW(measure_link_rate(*device_, 1, 0), std::invalid_argument);
}

const auto kDevices = ::testing::Values("Host", "Faulty", "Cuda");
constexpr auto kName = [](const auto& tested) { return std::string(tested.param); };
INSTANTIATE_TEST_SUITE_P(On, DeviceContract, kDevices, kName);
INSTANTIATE_TEST_SUITE_P(On, Managed, kDevices, kName);
INSTANTIATE_TEST_SUITE_P(On, Frames, kDevices, kName);

}  // namespace
}  // namespace penstock
