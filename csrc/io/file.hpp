// A regular file open for reading, as a source of bytes that must not change while it is open. It
// owns its descriptor and keeps the path for messages. Thread-safe: all reads give their own
// offset.
//
// A reader that keeps what it reads in memory of its own has no use for a second copy in the page
// cache. So, unless told otherwise, only what the page cache had when the file was opened is read
// from there, and everything else past it, by direct reads. Nobody else's cached bytes are thrown
// away for that. Where the file system refuses direct reads, what an ordinary read has brought in
// is dropped behind it. The system tells only who owns a file, or may write to it, what of it is
// cached; for anybody else, nothing counts as cached.
//
// What was cached at the time is looked at by blocks, at both ends of each. Ordinary reads of
// cached bytes make the system read ahead beyond them; asked later, all of the file would seem
// cached.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace penstock {

/// Direct reads have file offset, size and address in multiples of it; no disk asks for more.
inline constexpr std::size_t kDirectAlignment = 4096;

/// Whether what is read stays in the page cache.
enum class PageCache : bool { kSpare, kUse };

class File {
 public:
  /// @throws CheckpointError where the file is missing, not readable or not a regular file.
  explicit File(std::string path, PageCache cache = PageCache::kSpare);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const noexcept { return path_; }
  int descriptor() const noexcept { return descriptor_; }
  /// In bytes, when it was opened.
  std::uint64_t size() const noexcept { return size_; }

  /// Reads exactly `nbytes` at `offset` into `target`.
  /// @param room  Bytes of `target`, where more than `nbytes` of them may be written to: a direct
  ///              read whose offset, target and room are aligned needs no buffer in between.
  /// @throws CheckpointError where the file ends early, the read fails, or the file was changed
  ///         since it was opened.
  void read(void* target, std::uint64_t offset, std::size_t nbytes, std::size_t room = 0) const;

  /// Whether it has the size and the time of its last write that it had when it was opened. Asked
  /// after a read, since the system sets them before it changes bytes. They do not tell of a write
  /// whose time was put back, of one in the same tick of the system's clock as the last before the
  /// file was opened, nor at once of one through a mapping.
  bool is_unchanged() const noexcept;
  /// @param offset  For the error: the byte that is wanted. @throws CheckpointError where not.
  void require_unchanged(std::uint64_t offset) const;

 private:
  void read_any(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                std::size_t room) const;
  void read_cached(std::byte* target, std::uint64_t offset, std::size_t nbytes) const;
  std::size_t read_direct(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                          std::size_t room) const;
  void look_into_page_cache(const struct stat& status);
  bool cached_now(std::uint64_t offset, std::size_t nbytes) const noexcept;
  bool cached(std::uint64_t offset, std::size_t nbytes) const;

  std::string path_;
  int descriptor_ = -1;
  std::uint64_t size_ = 0;
  struct timespec written_{};
  PageCache cache_;
  int direct_ = -1;           // of the same file; -1 where direct reads are refused
  void* mapping_ = nullptr;   // never touched: only asked which of it is in the page cache
  std::vector<bool> blocks_;  // by block: whether it was cached at first; empty: nobody knows
  mutable std::atomic<bool> refused_{false};
};

}  // namespace penstock
