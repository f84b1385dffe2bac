#include "io/direct_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "io/mapping.hpp"

namespace penstock {

DirectFile::DirectFile(const std::string& path) : file_(path) {
  // The same file, also where another has taken its name meanwhile.
  const std::string same = "/proc/self/fd/" + std::to_string(file_.descriptor());
  direct_ = ::open(same.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (direct_ < 0 || file_.size() == 0) return;
  void* mapping = ::mmap(nullptr, static_cast<std::size_t>(file_.size()), PROT_READ, MAP_SHARED,
                         file_.descriptor(), 0);
  if (mapping != MAP_FAILED) mapping_ = mapping;
}

DirectFile::~DirectFile() {
  if (mapping_ != nullptr) ::munmap(mapping_, static_cast<std::size_t>(file_.size()));
  if (direct_ >= 0) ::close(direct_);
}

// A trial read that must not wait (RWF_NOWAIT) would answer too, but starts to read ahead.
bool DirectFile::cached(std::uint64_t offset, std::size_t nbytes) const {
  if (mapping_ == nullptr || offset >= file_.size()) return false;
  const std::size_t start = static_cast<std::size_t>(offset) / system_page() * system_page();
  const auto end =
      std::min(static_cast<std::size_t>(file_.size()), static_cast<std::size_t>(offset) + nbytes);
  std::vector<unsigned char> pages((end - start + system_page() - 1) / system_page());
  if (::mincore(static_cast<std::byte*>(mapping_) + start, end - start, pages.data()) != 0) {
    return false;
  }
  return std::all_of(pages.begin(), pages.end(),
                     [](unsigned char page) { return (page & 1) != 0; });
}

// Reads as far as direct reads go. Where they end, and why, an ordinary read will tell.
std::size_t DirectFile::read_direct(std::byte* target, std::uint64_t offset,
                                    std::size_t nbytes) const {
  std::size_t done = 0;
  while (done < nbytes && done % kDirectAlignment == 0) {
    const ssize_t got =
        ::pread(direct_, target + done, nbytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) refused_ = true;
    if (got <= 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

void DirectFile::read(std::byte* target, std::uint64_t offset, std::size_t nbytes,
                      std::size_t needed) const {
  const bool direct = direct_ >= 0 && !refused_ && !cached(offset, nbytes);
  const std::size_t done = direct ? read_direct(target, offset, nbytes) : 0;
  if (done < needed) file_.read(target + done, offset + done, needed - done);
}

}  // namespace penstock
