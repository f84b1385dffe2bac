// What the host device promises beyond the contract: it is checked memory. What is not mapped
// cannot be read, and addresses that are not its own are refused.
#include "device/host/host_device.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>

#include "device/handles.hpp"
#include "device/host/host_memory.hpp"
#include "error/error.hpp"
#include "io/file.hpp"
#include "support/child.hpp"
#include "support/files.hpp"

namespace penstock {
namespace {

using namespace testing;

// Sets an environment variable for as long as it lives.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    ::setenv(name, value.c_str(), 1);
  }
  ~Environment() {
    if (before_) {
      ::setenv(name_, before_->c_str(), 1);
    } else {
      ::unsetenv(name_);
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

int signal_of_reading(const void* address) {
  const ChildEnd child = run_in_child([address] {
    const volatile char* byte = static_cast<const char*>(address);
    static_cast<void>(*byte);
    return 0;
  });
  return child.signal;
}

TEST(HostDevice, UnmappedAddressesCannotBeRead) {
  HostDevice device;
  const std::size_t nbytes = device.info().frame_granularity;
  void* address = device.address_reserve(nbytes);
  EXPECT_EQ(signal_of_reading(address), SIGSEGV);
  const FrameHandle frame = device.frame_create(nbytes);
  device.map(address, frame, nbytes);
  EXPECT_EQ(signal_of_reading(address), 0);
  device.unmap(address, nbytes);
  EXPECT_EQ(signal_of_reading(address), SIGSEGV);
  device.frame_release(frame);
  device.address_release(address, nbytes);
}

TEST(HostDevice, NewFrameNeverShowsTheBytesOfAnOldOne) {
  HostDevice device;
  const std::size_t nbytes = device.info().frame_granularity;
  auto* address = static_cast<unsigned char*>(device.address_reserve(nbytes));
  FrameHandle frame = device.frame_create(nbytes);
  device.map(address, frame, nbytes);
  std::memset(address, 0xAA, nbytes);
  device.unmap(address, nbytes);
  device.frame_release(frame);
  frame = device.frame_create(nbytes);
  device.map(address, frame, nbytes);
  EXPECT_EQ(Bytes(address, address + nbytes), Bytes(nbytes, 0));
  device.unmap(address, nbytes);
  device.frame_release(frame);
  device.address_release(address, nbytes);
}

TEST(HostDevice, FramesThatItDoesNotKnowAreRefused) {
  HostDevice device;
  const std::size_t nbytes = device.info().frame_granularity;
  void* address = device.address_reserve(nbytes);
  EXPECT_THROW(device.map(address, FrameHandle{7}, nbytes), std::invalid_argument);
  const FrameHandle frame = device.frame_create(nbytes);
  device.frame_release(frame);
  EXPECT_THROW(device.frame_release(frame), std::invalid_argument);
  EXPECT_THROW(device.map(address, frame, nbytes), std::invalid_argument);
  device.address_release(address, nbytes);
}

TEST(HostDevice, ForeignAddressesAreRefusedAndNotWritten) {
  const TemporaryDirectory directory;
  const File file(directory.write("weights", pattern(100, 1)));
  HostDevice device;
  Bytes foreign(100, 7);
  void* range = device.managed_reserve(4096, Access::kReadMostly);
  auto* end = static_cast<char*>(range) + 4096;
  const Bytes source = pattern(100, 2);
  EXPECT_THROW(device.managed_write(foreign.data(), source.data(), 100), std::invalid_argument);
  EXPECT_THROW(device.managed_read(foreign.data(), file, 0, 100), std::invalid_argument);
  EXPECT_THROW(device.managed_write(end - 99, source.data(), 100), std::invalid_argument);
  EXPECT_THROW(device.managed_read(end - 99, file, 0, 100), std::invalid_argument);
  EXPECT_THROW(device.managed_write(end, source.data(), ~std::size_t{0}), std::invalid_argument);
  EXPECT_THROW(device.managed_release(foreign.data(), 100), std::invalid_argument);
  EXPECT_EQ(foreign, Bytes(100, 7));
  device.managed_write(end - 100, source.data(), 100);
  device.managed_release(range, 4096);
  EXPECT_THROW(device.managed_release(range, 4096), std::invalid_argument);
  EXPECT_THROW(device.managed_write(range, source.data(), 100), std::invalid_argument);
}

// ---- where evicted bytes go --------------------------------------------------------------------

TEST(SpillDirectory, IsTheOneThatWasChosenAndKeepsNoFiles) {
  const TemporaryDirectory directory;
  const Environment chosen("PENSTOCK_SPILL_DIR", directory.path());
  EXPECT_EQ(spill_directory(), directory.path());
  HostDevice device;
  void* range = device.managed_reserve(std::size_t{1} << 20, Access::kReadMostly);
  // Nothing to find, and nothing to clean up after a crash: the file has no name.
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
  device.managed_release(range, std::size_t{1} << 20);
}

TEST(SpillDirectory, ThatIsMissingIsNamed) {
  const TemporaryDirectory directory;
  const std::string missing = directory.path("missing");
  const Environment chosen("PENSTOCK_SPILL_DIR", missing);
  HostDevice device;
  try {
    device.managed_reserve(4096, Access::kReadMostly);
    FAIL() << "reserved in a directory that is not there";
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find(missing), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("PENSTOCK_SPILL_DIR"), std::string::npos);
  }
}

TEST(SpillDirectory, ThatIsAFileIsNamed) {
  const TemporaryDirectory directory;
  const std::string file = directory.write("file", {1});
  const Environment chosen("PENSTOCK_SPILL_DIR", file);
  HostDevice device;
  try {
    device.managed_reserve(4096, Access::kReadMostly);
    FAIL() << "reserved in a file";
  } catch (const DeviceError& error) {
    EXPECT_NE(std::string(error.what()).find(file), std::string::npos) << error.what();
  }
}

TEST(SpillDirectory, IsADirectoryThatExistsWhereNoneIsChosen) {
  const Environment chosen("PENSTOCK_SPILL_DIR", "");
  EXPECT_TRUE(std::filesystem::is_directory(spill_directory()));
}

}  // namespace
}  // namespace penstock
