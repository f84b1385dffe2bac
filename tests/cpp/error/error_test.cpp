// Errors carry their figures, and messages give byte counts the same way everywhere.
#include "error/error.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <limits>

#include "error/format.hpp"

namespace penstock {
namespace {

TEST(Format, BytesAreForPeopleAndExact) {
  EXPECT_EQ(format_bytes(0), "0 bytes");
  EXPECT_EQ(format_bytes(1023), "1023 bytes");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB (1024 bytes)");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB (1536 bytes)");
  EXPECT_EQ(format_bytes(std::size_t{3} << 19), "1.50 MiB (1572864 bytes)");
  EXPECT_EQ(format_bytes(std::size_t{3} << 29), "1.50 GiB (1610612736 bytes)");
  EXPECT_EQ(format_bytes(std::size_t{1} << 40), "1.00 TiB (1099511627776 bytes)");
  EXPECT_EQ(format_bytes(std::numeric_limits<std::size_t>::max()),
            "16384.00 PiB (18446744073709551615 bytes)");
}

TEST(Error, DeviceErrorNamesCallAndCode) {
  const DeviceError error("cudaMemPrefetchAsync", 2, "out of memory");
  EXPECT_EQ(error.call, "cudaMemPrefetchAsync");
  EXPECT_EQ(error.code, 2);
  EXPECT_STREQ(error.what(), "cudaMemPrefetchAsync failed: out of memory (code 2)");
}

TEST(Error, SystemErrorSaysWhatErrnoMeans) {
  const DeviceError error = system_error("mmap", ENOMEM);
  EXPECT_EQ(error.code, ENOMEM);
  EXPECT_NE(std::string(error.what()).find("Cannot allocate memory"), std::string::npos);
}

TEST(Error, FiguresAreMembers) {
  const CapExceededError cap("full", 3, 2, 1);
  EXPECT_EQ(cap.requested, 3U);
  EXPECT_EQ(cap.cap, 2U);
  EXPECT_EQ(cap.used, 1U);
  const CheckpointError checkpoint("short", "a.safetensors", std::uint64_t{1} << 40);
  EXPECT_EQ(checkpoint.path, "a.safetensors");
  EXPECT_EQ(checkpoint.offset, std::uint64_t{1} << 40);
}

TEST(Error, AllAreCaughtAsTheBase) {
  EXPECT_THROW(throw CapExceededError("", 0, 0, 0), Error);
  EXPECT_THROW(throw DeviceError("", 0, ""), Error);
  EXPECT_THROW(throw CheckpointError("", "", 0), Error);
  EXPECT_THROW(throw ScheduleError(""), Error);
}

}  // namespace
}  // namespace penstock
