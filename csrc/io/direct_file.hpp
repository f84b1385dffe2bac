// A file that is read past the page cache where the page cache does not have it: bytes of a model
// larger than memory would only push each other out of it. What is cached is read from the cache,
// and so is everything where the file system refuses direct reads. Thread-safe.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "io/file.hpp"

namespace penstock {

/// Direct reads have file offset, size and address in multiples of it; no disk asks for more.
inline constexpr std::size_t kDirectAlignment = 4096;

class DirectFile {
 public:
  /// @throws CheckpointError where the file cannot be opened.
  explicit DirectFile(const std::string& path);
  ~DirectFile();
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  const File& file() const noexcept { return file_; }

  /// Reads `nbytes` at `offset`, of which those up to `needed` have to be there: the file may end
  /// behind them. Offset, size and target are aligned to kDirectAlignment.
  /// @throws CheckpointError where the file ends early or cannot be read.
  void read(std::byte* target, std::uint64_t offset, std::size_t nbytes, std::size_t needed) const;

 private:
  bool cached(std::uint64_t offset, std::size_t nbytes) const;
  std::size_t read_direct(std::byte* target, std::uint64_t offset, std::size_t nbytes) const;

  File file_;
  int direct_ = -1;          // of the same file; -1 where direct reads are refused
  void* mapping_ = nullptr;  // never touched: only asked which of it is in the page cache
  mutable std::atomic<bool> refused_{false};
};

}  // namespace penstock
