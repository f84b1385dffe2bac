#include "io/file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <new>
#include <utility>

#include "error/error.hpp"
#include "io/mapping.hpp"

namespace penstock {

namespace {

// One direct read: large enough for a disk's full rate beside other readers.
constexpr std::size_t kBlock = std::size_t{4} << 20;

std::string time_text(const struct timespec& time) {
  struct tm parts{};
  char text[48] = "?";
  if (::gmtime_r(&time.tv_sec, &parts) != nullptr) {
    std::strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", &parts);
  }
  const std::string fraction = std::to_string(1000000000 + time.tv_nsec);
  return std::string(text) + "." + fraction.substr(1) + " UTC";
}

std::string state_text(std::uint64_t size, const struct timespec& written) {
  return std::to_string(size) + " bytes, last written " + time_text(written);
}

std::uint64_t align_down(std::uint64_t offset, std::size_t alignment) {
  return offset / alignment * alignment;
}

bool is_aligned(const void* target, std::uint64_t offset, std::size_t room) {
  return reinterpret_cast<std::uintptr_t>(target) % kDirectAlignment == 0 &&
         offset % kDirectAlignment == 0 && room % kDirectAlignment == 0;
}

// Direct reads go on as long as they are whole. Where they end, and why, an ordinary one will tell.
// @return bytes read; sets `refused` where the file system does not do such reads.
std::size_t read_aligned(int descriptor, std::byte* target, std::uint64_t offset,
                         std::size_t nbytes, std::atomic<bool>& refused) {
  std::size_t done = 0;
  while (done < nbytes && done % kDirectAlignment == 0) {
    const ssize_t got =
        ::pread(descriptor, target + done, nbytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) refused = true;
    if (got <= 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

}  // namespace

File::File(std::string path, PageCache cache) : path_(std::move(path)), cache_(cache) {
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) {
    throw CheckpointError("cannot open " + path_ + ": " + std::strerror(errno), path_, 0);
  }
  struct stat status{};
  const bool known = ::fstat(descriptor_, &status) == 0;
  if (!known || !S_ISREG(status.st_mode)) {
    const std::string reason = known ? "not a regular file" : std::strerror(errno);
    ::close(descriptor_);
    throw CheckpointError("cannot read " + path_ + ": " + reason, path_, 0);
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
  written_ = status.st_mtim;
  if (cache_ == PageCache::kSpare && size_ > 0) look_into_page_cache(status);
}

File::~File() {
  if (mapping_ != nullptr) ::munmap(mapping_, static_cast<std::size_t>(size_));
  if (direct_ >= 0) ::close(direct_);
  ::close(descriptor_);
}

void File::look_into_page_cache(const struct stat& status) {
  // The same file, also where another has taken its name meanwhile.
  const std::string same = "/proc/self/fd/" + std::to_string(descriptor_);
  direct_ = ::open(same.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  const bool told =
      status.st_uid == ::geteuid() || ::faccessat(AT_FDCWD, same.c_str(), W_OK, AT_EACCESS) == 0;
  if (!told) return;
  void* mapping =
      ::mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_SHARED, descriptor_, 0);
  if (mapping == MAP_FAILED) return;
  mapping_ = mapping;
  for (std::uint64_t at = 0; at < size_; at += kBlock) {
    blocks_.push_back(cached_now(at, std::min<std::uint64_t>(kBlock, size_ - at)));
  }
}

// Both ends: to ask for each page would cost a tenth of reading them. A trial read that must not
// wait (RWF_NOWAIT) would answer too, but starts to read ahead.
bool File::cached_now(std::uint64_t offset, std::size_t nbytes) const noexcept {
  const auto is_there = [&](std::uint64_t at) {
    unsigned char page = 0;
    auto* address = static_cast<std::byte*>(mapping_) + align_down(at, system_page());
    return ::mincore(address, 1, &page) == 0 && (page & 1) != 0;
  };
  return is_there(offset) && is_there(offset + nbytes - 1);
}

bool File::cached(std::uint64_t offset, std::size_t nbytes) const {
  const std::uint64_t end = std::min<std::uint64_t>(offset + nbytes, size_);
  if (blocks_.empty() || offset >= end) return false;
  for (std::uint64_t block = offset / kBlock; block * kBlock < end; ++block) {
    if (!blocks_[block]) return false;
  }
  return cached_now(offset, end - offset);
}

void File::read(void* target, std::uint64_t offset, std::size_t nbytes, std::size_t room) const {
  read_any(static_cast<std::byte*>(target), offset, nbytes, std::max(room, nbytes));
  require_unchanged(offset);
}

void File::read_any(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                    std::size_t room) const {
  if (cache_ == PageCache::kUse || offset >= size_) return read_cached(target, offset, nbytes);
  while (nbytes > 0) {
    const auto part =
        static_cast<std::size_t>(std::min<std::uint64_t>(nbytes, kBlock - offset % kBlock));
    const bool is_cached = cached(offset, part);
    const std::size_t done =
        is_cached ? 0 : read_direct(target, offset, part, part < nbytes ? part : room);
    if (done < part) {
      read_cached(target + done, offset + done, part - done);
      // In whole system pages: those at the ends go too, and with the next part they may come
      // again.
      const std::uint64_t first = align_down(offset + done, system_page());
      if (!is_cached && !blocks_.empty()) {
        ::posix_fadvise(descriptor_, static_cast<off_t>(first),
                        static_cast<off_t>(round_up(offset + part - first, system_page())),
                        POSIX_FADV_DONTNEED);
      }
    }
    target += part;
    offset += part;
    nbytes -= part;
    room -= part;
  }
}

std::size_t File::read_direct(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                              std::size_t room) const {
  if (direct_ < 0 || refused_) return 0;
  if (is_aligned(target, offset, room)) {
    return std::min(nbytes, read_aligned(direct_, target, offset, room, refused_));
  }
  const std::uint64_t first = align_down(offset, kDirectAlignment);
  const std::size_t skew = offset - first;
  const std::size_t most = round_up(skew + nbytes, kDirectAlignment);
  const std::unique_ptr<void, decltype(&std::free)> buffer(
      std::aligned_alloc(kDirectAlignment, most), &std::free);
  if (!buffer) throw std::bad_alloc();
  auto* read = static_cast<std::byte*>(buffer.get());
  const std::size_t got = read_aligned(direct_, read, first, most, refused_);
  if (got <= skew) return 0;
  const std::size_t done = std::min(nbytes, got - skew);
  std::memcpy(target, read + skew, done);
  return done;
}

void File::read_cached(std::byte* target, std::uint64_t offset, std::size_t nbytes) const {
  std::size_t done = 0;
  while (done < nbytes) {
    const ssize_t got =
        ::pread(descriptor_, target + done, nbytes - done, static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got == 0) {
      require_unchanged(offset + done);
      throw CheckpointError(path_ + " ends at byte " + std::to_string(offset + done) + ", but " +
                                std::to_string(nbytes - done) + " more bytes are needed",
                            path_, offset + done);
    } else if (errno != EINTR) {
      throw CheckpointError("cannot read " + path_ + " at byte " + std::to_string(offset + done) +
                                ": " + std::strerror(errno),
                            path_, offset + done);
    }
  }
}

bool File::is_unchanged() const noexcept {
  struct stat status{};
  return ::fstat(descriptor_, &status) == 0 &&
         static_cast<std::uint64_t>(status.st_size) == size_ &&
         status.st_mtim.tv_sec == written_.tv_sec && status.st_mtim.tv_nsec == written_.tv_nsec;
}

void File::require_unchanged(std::uint64_t offset) const {
  if (is_unchanged()) return;
  struct stat status{};
  const bool known = ::fstat(descriptor_, &status) == 0;
  const std::string now =
      known ? "now it has " + state_text(static_cast<std::uint64_t>(status.st_size), status.st_mtim)
            : std::string("now it cannot be asked: ") + std::strerror(errno);
  throw CheckpointError(path_ + " was changed while its weights were in use: it had " +
                            state_text(size_, written_) + ", when it was opened, and " + now +
                            ". Unregister the model and register it again; write new weights to "
                            "another file, or use host=\"pinned\", which keeps a copy",
                        path_, offset);
}

}  // namespace penstock
