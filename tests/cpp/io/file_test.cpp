// Files as sources of bytes: whole reads, or errors that name path and offset.
#include "io/file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/files.hpp"

namespace penstock {
namespace {

using namespace testing;

void expect_refused(const std::string& path, const std::string& reason) {
  try {
    const File file(path);
    ADD_FAILURE() << path << " was opened";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.path, path);
    EXPECT_EQ(error.offset, 0U);
    EXPECT_NE(std::string(error.what()).find(path), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find(reason), std::string::npos) << error.what();
  }
}

TEST(File, ReadsExactlyWhatIsAskedFor) {
  const TemporaryDirectory directory;
  const Bytes content = pattern(10000, 1);
  const File file(directory.write("weights", content));
  EXPECT_EQ(file.size(), content.size());
  Bytes bytes(4000);
  file.read(bytes.data(), 5999, bytes.size());
  EXPECT_EQ(bytes, Bytes(content.begin() + 5999, content.begin() + 9999));
  file.read(nullptr, 0, 0);
  file.read(nullptr, 20000, 0);
}

TEST(File, EndBeforeTheBytesIsAnErrorAtTheEnd) {
  const TemporaryDirectory directory;
  const std::string path = directory.write("weights", pattern(100, 1));
  const File file(path);
  Bytes bytes(200);
  try {
    file.read(bytes.data(), 50, 100);
    FAIL() << "read past the end";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.path, path);
    EXPECT_EQ(error.offset, 100U);
    EXPECT_NE(std::string(error.what()).find("50 more bytes"), std::string::npos) << error.what();
  }
  EXPECT_THROW(file.read(bytes.data(), 101, 1), CheckpointError);
  EXPECT_THROW(file.read(bytes.data(), ~std::uint64_t{0}, 1), CheckpointError);
}

TEST(File, TruncationAfterOpeningIsNoticed) {
  const TemporaryDirectory directory;
  const std::string path = directory.write("weights", pattern(100, 1));
  const File file(path);
  std::filesystem::resize_file(path, 60);
  Bytes bytes(100);
  EXPECT_THROW(file.read(bytes.data(), 0, 100), CheckpointError);
}

TEST(File, WhatIsNoRegularFileIsRefused) {
  const TemporaryDirectory directory;
  expect_refused(directory.path("missing"), "No such file");
  expect_refused(directory.path(), "not a regular file");
  expect_refused("/dev/null", "not a regular file");
  expect_refused("", "No such file");
  const std::string fifo = directory.path("fifo");
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  expect_refused(fifo, "not a regular file");  // and does not wait for a writer
}

TEST(File, EmptyFileHasNoBytes) {
  const TemporaryDirectory directory;
  const File file(directory.write("empty", {}));
  EXPECT_EQ(file.size(), 0U);
  char byte = 0;
  EXPECT_THROW(file.read(&byte, 0, 1), CheckpointError);
}

// ---- the page cache ----------------------------------------------------------------------------

constexpr std::size_t kMiB = std::size_t{1} << 20;

struct FileInPageCache : ::testing::Test {
  const TemporaryDirectory directory;
  const Bytes content = pattern(13 * kMiB + 777, 1);
  const std::string path = directory.write("weights", content);

  void SetUp() override {
    if (!drop_cached(path)) GTEST_SKIP() << "the files of this system are never out of memory";
  }

  void read_all(const File& file) {
    Bytes bytes(content.size() - 9);
    file.read(bytes.data(), 9, bytes.size());
    EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), content.begin() + 9));
  }

  /// Opens the file where a second descriptor, that for direct reads, cannot be had.
  std::unique_ptr<File> open_without_direct_reads() {
    struct rlimit limit{};
    EXPECT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
    const int next = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    ::close(next);
    const struct rlimit low{static_cast<rlim_t>(next) + 1, limit.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
    auto file = std::make_unique<File>(path);
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
    return file;
  }
};

TEST_F(FileInPageCache, WhatIsNotThereIsReadPastIt) {
  read_all(File(path));
  EXPECT_EQ(cached_bytes(path), 0U);
}

TEST_F(FileInPageCache, WhatIsNotThereIsDroppedWhereDirectReadsAreRefused) {
  read_all(*open_without_direct_reads());
  EXPECT_LT(cached_bytes(path), kMiB);  // what the system had on its way may arrive later
}

TEST_F(FileInPageCache, WhatIsThereStays) {
  read_all(File(path, PageCache::kUse));
  const std::size_t all = cached_bytes(path);
  EXPECT_GE(all, content.size());
  read_all(File(path));
  read_all(*open_without_direct_reads());
  EXPECT_EQ(cached_bytes(path), all);
}

TEST_F(FileInPageCache, WhatIsPartlyThereGrowsNoFurther) {
  Bytes bytes(1000);
  const File other(path, PageCache::kUse);
  for (std::size_t at = 0; at < 300000; at += 1000) other.read(bytes.data(), at, 1000);
  const std::size_t before = cached_bytes(path);
  const File file(path);
  for (int pass = 0; pass < 3; ++pass) {
    for (std::size_t at = 0; at + kMiB / 4 <= content.size(); at += kMiB / 4) {
      Bytes part(kMiB / 4);
      file.read(part.data(), at, part.size());
      ASSERT_TRUE(std::equal(part.begin(), part.end(), content.begin() + static_cast<long>(at)));
    }
  }
  EXPECT_LE(cached_bytes(path), before + 8 * kMiB) << "what the system reads ahead once";
  EXPECT_LT(cached_bytes(path), content.size() * 9 / 10);
}

TEST_F(FileInPageCache, AnyRangeIsReadRight) {
  std::mt19937_64 random(1);
  const File file(path);
  const auto without = open_without_direct_reads();
  constexpr std::size_t kRoom = 4 * kDirectAlignment;
  std::vector<unsigned char> memory(content.size() + 2 * kRoom);
  for (int i = 0; i < 300; ++i) {
    if (i % 50 == 0) drop_cached(path);
    const bool aligned = i % 3 == 0;
    std::size_t offset = random() % content.size();
    if (aligned) offset = offset / kDirectAlignment * kDirectAlignment;
    const std::size_t most = i % 10 == 0 ? content.size() : 20000;
    const std::size_t nbytes = 1 + random() % std::min(most, content.size() - offset);
    unsigned char* target = memory.data();
    const auto skew = reinterpret_cast<std::uintptr_t>(target) % kDirectAlignment;
    target += (kDirectAlignment - skew) % kDirectAlignment + (aligned ? 0 : random() % 5);
    const std::size_t room = (nbytes + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
    target[room] = 77;
    (i % 2 == 0 ? file : *without).read(target, offset, nbytes, aligned ? room : 0);
    ASSERT_TRUE(std::equal(target, target + nbytes, content.begin() + static_cast<long>(offset)))
        << offset << " " << nbytes;
    ASSERT_EQ(target[room], 77);
  }
}

// ---- changes -----------------------------------------------------------------------------------

TEST(File, ChangesOfSizeOrTimeAreNoticed) {
  const TemporaryDirectory directory;
  for (int how = 0; how < 4; ++how) {
    const std::string path = directory.write("weights", pattern(5000, 1));
    const File file(path);
    EXPECT_TRUE(file.is_unchanged());
    file.require_unchanged(7);
    if (how == 0) std::filesystem::resize_file(path, 4999);
    if (how == 1) std::filesystem::resize_file(path, 5001);
    if (how == 2) overwrite(path, 100, pattern(10, 2));
    if (how == 3) directory.write("weights", pattern(6000, 3));
    EXPECT_FALSE(file.is_unchanged());
    try {
      file.require_unchanged(7);
      FAIL() << how;
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.path, path);
      EXPECT_EQ(error.offset, 7U);
      const std::string text = error.what();
      EXPECT_NE(text.find("it had 5000 bytes"), std::string::npos) << text;
      EXPECT_NE(text.find("register it again"), std::string::npos) << text;
    }
  }
}

TEST(File, OneThatTakesItsNameIsNoChange) {
  const TemporaryDirectory directory;
  const Bytes content = pattern(5000, 1);
  const File file(directory.write("weights", content));
  std::filesystem::rename(directory.write("other", pattern(4000, 2)), directory.path("weights"));
  EXPECT_TRUE(file.is_unchanged());
  Bytes bytes(5000);
  file.read(bytes.data(), 0, bytes.size());
  EXPECT_EQ(bytes, content);
}

}  // namespace
}  // namespace penstock
