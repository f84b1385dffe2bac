// Files as sources of bytes: whole reads, or errors that name path and offset.
#include "io/file.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>

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

}  // namespace
}  // namespace penstock
