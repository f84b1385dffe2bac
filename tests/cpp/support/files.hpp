// Directories and files that tests write and that vanish with their owner.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace penstock::testing {

using Bytes = std::vector<unsigned char>;

/// Bytes that differ from place to place and from seed to seed, so that a shifted, repeated or
/// missing piece is seen.
inline Bytes pattern(std::size_t nbytes, std::size_t seed) {
  Bytes bytes(nbytes);
  std::uint64_t state = seed * 0x9E3779B97F4A7C15U + 1;
  for (auto& byte : bytes) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    byte = static_cast<unsigned char>(state >> 56);
  }
  return bytes;
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string path = ::testing::TempDir() + "/penstock-XXXXXX";
    if (::mkdtemp(path.data()) == nullptr) throw std::runtime_error("mkdtemp " + path);
    path_ = path;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;

  std::string path(const std::string& name = "") const { return (path_ / name).string(); }

  std::string write(const std::string& name, const Bytes& bytes) const {
    std::ofstream file(path_ / name, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    if (!file.flush()) throw std::runtime_error("cannot write " + name);
    return path(name);
  }

 private:
  std::filesystem::path path_;
};

/// Writes over bytes of a file; its time of writing is then another one, however coarse the clock.
inline void overwrite(const std::string& path, std::size_t offset, const Bytes& bytes) {
  const auto written = std::filesystem::last_write_time(path);
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
  file.close();
  std::filesystem::last_write_time(path, written + std::chrono::seconds(1));
}

/// The same, with the time put back to what it was.
inline void overwrite_unseen(const std::string& path, std::size_t offset, const Bytes& bytes) {
  const auto written = std::filesystem::last_write_time(path);
  overwrite(path, offset, bytes);
  std::filesystem::last_write_time(path, written);
}

/// Bytes of a file that are in the page cache, in whole system pages.
inline std::size_t cached_bytes(const std::string& path) {
  const std::size_t size = std::filesystem::file_size(path);
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  void* mapping = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
  ::close(descriptor);
  if (mapping == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  Bytes pages((size + page - 1) / page);
  const int result = ::mincore(mapping, size, pages.data());
  ::munmap(mapping, size);
  if (result != 0) throw std::runtime_error("mincore " + path);
  std::size_t found = 0;
  for (const unsigned char each : pages) found += (each & 1) != 0 ? page : 0;
  return found;
}

/// Drops a file from the page cache. @return whether it is out of it: in memory it cannot be.
inline bool drop_cached(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ::fsync(descriptor);
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  ::close(descriptor);
  return cached_bytes(path) == 0;
}

}  // namespace penstock::testing
