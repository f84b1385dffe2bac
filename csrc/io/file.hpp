// A regular file open for reading, as a source of bytes. It owns its descriptor and keeps the path
// for messages. Thread-safe: all reads give their own offset.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace penstock {

class File {
 public:
  /// @throws CheckpointError where the file is missing, not readable or not a regular file.
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const noexcept { return path_; }
  int descriptor() const noexcept { return descriptor_; }
  std::uint64_t size() const noexcept { return size_; }

  /// Reads exactly `nbytes` at `offset` into `target`.
  /// @throws CheckpointError where the file ends early or the read fails.
  void read(void* target, std::uint64_t offset, std::size_t nbytes) const;

 private:
  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
};

}  // namespace penstock
