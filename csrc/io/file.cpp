#include "io/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "error/error.hpp"

namespace penstock {

File::File(std::string path) : path_(std::move(path)) {
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
}

File::~File() {
  ::close(descriptor_);
}

void File::read(void* target, std::uint64_t offset, std::size_t nbytes) const {
  auto* bytes = static_cast<char*>(target);
  std::size_t done = 0;
  while (done < nbytes) {
    const ssize_t got =
        ::pread(descriptor_, bytes + done, nbytes - done, static_cast<off_t>(offset + done));
    if (got > 0) {
      done += static_cast<std::size_t>(got);
    } else if (got == 0) {
      throw CheckpointError(path_ + " ends at byte " + std::to_string(offset + done) + ", but " +
                                std::to_string(nbytes - done) +
                                " more bytes are needed: was it truncated after it was opened?",
                            path_, offset + done);
    } else if (errno != EINTR) {
      throw CheckpointError("cannot read " + path_ + " at byte " + std::to_string(offset + done) +
                                ": " + std::strerror(errno),
                            path_, offset + done);
    }
  }
}

}  // namespace penstock
