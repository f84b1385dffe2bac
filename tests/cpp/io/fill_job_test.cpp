// Filling a region from files: every byte in its place, nothing resident, and errors that name the
// file and the place.
#include "io/fill_job.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/pager_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr std::size_t kPiece = std::size_t{16} << 20;  // what a job reads at once

struct FillJobTest : ::testing::Test {
  PagerSetup setup{4};
  TemporaryDirectory directory;
};

TEST_F(FillJobTest, PutsEveryExtentOfEveryFileInItsPlace) {
  constexpr std::size_t kFiles = 5;
  constexpr std::size_t kExtents = 40;
  std::vector<std::string> paths;
  std::vector<Bytes> contents;
  for (std::size_t i = 0; i < kFiles; ++i) {
    contents.push_back(pattern(50000 + i, i));
    paths.push_back(directory.write("file" + std::to_string(i), contents.back()));
  }
  for (const std::size_t threads : {0, 1, 3, 16}) {
    const auto region = setup.reserve(8);
    Bytes expected(region->nbytes(), 0);  // what no extent names stays as it was
    std::vector<Extent> extents;
    std::size_t at = 3;
    std::size_t total = 0;
    for (std::size_t i = 0; i < kExtents; ++i) {
      const std::size_t file = i * 7 % kFiles;
      const std::size_t nbytes = i * i * 3 % 9000;
      const std::size_t offset = i * 911 % (contents[file].size() - nbytes);
      extents.push_back({file, offset, at, nbytes});
      std::copy_n(contents[file].begin() + static_cast<std::ptrdiff_t>(offset), nbytes,
                  expected.begin() + static_cast<std::ptrdiff_t>(at));
      at += nbytes + i % 5;
      total += nbytes;
    }
    ASSERT_LE(at, region->nbytes());
    FillJob job(region, paths, extents, threads);
    EXPECT_TRUE(job.wait_for(kLongest));
    EXPECT_EQ(job.total_bytes(), total);
    EXPECT_EQ(job.done_bytes(), total);
    EXPECT_EQ(setup.device->managed_resident(region->address(), region->nbytes()).value_or(0), 0U);
    EXPECT_TRUE(holds(*region, expected)) << threads << " threads";
  }
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST_F(FillJobTest, LargeExtentIsSharedAmongThreads) {
  const Bytes content = pattern(2 * kPiece + 12345, 1);
  const auto region = setup.pager->reserve(content.size() + 1, Access::kReadMostly);
  FillJob job(region, {directory.write("large", content)}, {{0, 0, 1, content.size()}}, 3);
  EXPECT_TRUE(job.wait_for(kLongest));
  EXPECT_EQ(setup.device->calls().at("managed_read"), 3U);
  EXPECT_EQ(std::memcmp(region->address() + 1, content.data(), content.size()), 0);
}

TEST_F(FillJobTest, NothingToDoIsDone) {
  const auto region = setup.reserve(1);
  EXPECT_TRUE(FillJob(region, {}, {}, 4).wait_for(kLongest));
  const std::string path = directory.write("file", pattern(10, 1));
  EXPECT_TRUE(FillJob(region, {path}, {{0, 10, kPage, 0}}, 4).wait_for(kLongest));
}

TEST_F(FillJobTest, WaitEndsAtItsLimitAndProgressIsSeen) {
  Gate gate;
  setup.spy->on_read = [&](std::uintptr_t, std::size_t, StreamHandle) { gate.wait(); };
  const auto region = setup.reserve(1);
  FillJob job(region, {directory.write("file", pattern(1000, 1))}, {{0, 0, 0, 1000}}, 1);
  EXPECT_FALSE(job.wait_for(milliseconds(0)));
  EXPECT_FALSE(job.wait_for(milliseconds(10)));
  EXPECT_EQ(job.done_bytes(), 0U);
  EXPECT_EQ(job.total_bytes(), 1000U);
  gate.open();
  EXPECT_TRUE(job.wait_for(milliseconds::max()));
  EXPECT_EQ(job.done_bytes(), 1000U);
}

TEST_F(FillJobTest, CancelledJobStopsAfterThePieceAtHand) {
  Gate gate;
  Gate reading;
  setup.spy->on_read = [&](std::uintptr_t, std::size_t, StreamHandle) {
    reading.open();
    gate.wait();
  };
  const auto region = setup.reserve(4);
  const std::string path = directory.write("file", pattern(4000, 1));
  FillJob job(region, {path}, {{0, 0, 0, 1000}, {0, 1000, 1000, 1000}, {0, 2000, 2000, 1000}}, 1);
  reading.wait();
  job.cancel();
  gate.open();
  EXPECT_FALSE(job.wait_for(kLongest));
  EXPECT_EQ(job.done_bytes(), 1000U);
  EXPECT_EQ(setup.device->calls().at("managed_read"), 1U);
}

TEST_F(FillJobTest, JobThatGoesWaitsForItsReadsAndKeepsTheRegionUntilThen) {
  Gate gate;
  Gate reading;
  setup.spy->on_read = [&](std::uintptr_t, std::size_t, StreamHandle) {
    reading.open();
    gate.wait();
  };
  const std::string path = directory.write("file", pattern(4000, 1));
  auto job = std::make_unique<FillJob>(setup.reserve(4), std::vector<std::string>{path},
                                       std::vector<Extent>{{0, 0, 0, 2000}, {0, 0, 2000, 2000}}, 1);
  reading.wait();
  Running end([&] { job.reset(); });
  // Were it to go at once, it would be gone within this time.
  EXPECT_FALSE(eventually([&] { return end.ended(); }, milliseconds(50)));
  EXPECT_EQ(setup.device->calls()["managed_release"], 0U);
  gate.open();
  end.join();
  EXPECT_EQ(setup.device->calls()["managed_release"], 1U);
}

// ---- errors ------------------------------------------------------------------------------------

TEST_F(FillJobTest, FileThatIsTruncatedMeanwhileIsNamedWithItsEnd) {
  const std::string path = directory.write("file", pattern(40000, 1));
  setup.spy->on_read = [&](std::uintptr_t, std::size_t, StreamHandle) {
    std::filesystem::resize_file(path, 15000);
  };
  const auto region = setup.reserve(1);
  FillJob job(region, {path}, {{0, 10000, 0, 20000}}, 2);
  for (int i = 0; i < 2; ++i) {  // whoever asks is told
    try {
      job.wait_for(kLongest);
      FAIL() << "read past the end";
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.path, path);
      EXPECT_EQ(error.offset, 15000U);
    }
  }
  EXPECT_LT(job.done_bytes(), job.total_bytes());
}

TEST_F(FillJobTest, FirstErrorStopsAllReaders) {
  const auto region = setup.reserve(4);
  const std::string path = directory.write("file", pattern(4000, 1));
  std::vector<Extent> extents;
  for (std::size_t i = 0; i < 200; ++i) extents.push_back({0, i, i, 1});
  setup.device->fail_nth_call_of("managed_read", 3);
  setup.device->delay_calls_of("managed_read", std::chrono::microseconds(200));
  FillJob job(region, {path}, extents, 4);
  EXPECT_THROW(job.wait_for(kLongest), DeviceError);
  EXPECT_LT(setup.device->calls().at("managed_read"), 50U);
}

TEST_F(FillJobTest, ExtentsThatFitNowhereAreRefusedBeforeAnythingIsRead) {
  const auto region = setup.pager->reserve(1000, Access::kReadMostly);
  const std::string path = directory.write("file", pattern(5000, 1));
  constexpr std::size_t kMost = ~std::size_t{0};
  const std::vector<Extent> outside_region = {
      {0, 0, 1001, 0}, {0, 0, 999, 2}, {0, 0, 0, 1001}, {0, 0, kMost, 1}, {0, 0, 1, kMost}};
  for (const Extent& extent : outside_region) {
    EXPECT_THROW(FillJob(region, {path}, {{0, 0, 0, 1}, extent}, 2), std::out_of_range);
  }
  EXPECT_THROW(FillJob(region, {path}, {{1, 0, 0, 1}}, 2), std::out_of_range);
  EXPECT_THROW(FillJob(region, {}, {{0, 0, 0, 0}}, 2), std::out_of_range);
  const std::vector<Extent> outside_file = {
      {0, 5000, 0, 1}, {0, 4999, 0, 2}, {0, 5001, 0, 0}, {0, ~std::uint64_t{0}, 0, 2}};
  for (const Extent& extent : outside_file) {
    try {
      FillJob(region, {path}, {{0, 0, 0, 1}, extent}, 2);
      ADD_FAILURE() << "read from " << extent.file_offset;
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.path, path);
      EXPECT_EQ(error.offset, extent.file_offset);
      EXPECT_NE(std::string(error.what()).find("5000 bytes"), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(FillJob(region, {path, directory.path("missing")}, {{0, 0, 0, 1}}, 2),
               CheckpointError);
  EXPECT_EQ(setup.device->calls().count("managed_read"), 0U);
}

}  // namespace
}  // namespace penstock
