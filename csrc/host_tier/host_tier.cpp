#include "host_tier/host_tier.hpp"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "error/error.hpp"
#include "io/mapping.hpp"

namespace penstock {

HostTier::HostTier(std::size_t nbytes, std::size_t page_size)
    : nbytes_(nbytes), page_size_(page_size), owner_(::getpid()) {
  if (page_size == 0 || page_size % system_page() != 0) {
    throw std::invalid_argument("a page of " + std::to_string(page_size) +
                                " bytes is no multiple of the system's " +
                                std::to_string(system_page()));
  }
}

void HostTier::check_range(std::size_t offset, std::size_t nbytes) const {
  if (offset > nbytes_ || nbytes > nbytes_ - offset) {
    throw std::out_of_range("bytes [" + std::to_string(offset) + ", " + std::to_string(offset) +
                            " + " + std::to_string(nbytes) + ") leave the host tier of " +
                            std::to_string(nbytes_) + " bytes");
  }
}

void HostTier::check_page(PageIndex page) const {
  if (page >= page_count()) {
    throw std::out_of_range("page " + std::to_string(page) + " of a host tier of " +
                            std::to_string(page_count()) + " pages");
  }
}

std::size_t HostTier::bytes_of(PageIndex page) const {
  return std::min(page_size_, nbytes_ - page * page_size_);
}

bool HostTier::in_owner_process() const noexcept {
  return owner_ == ::getpid();
}

void HostTier::require_owner_process() const {
  if (!in_owner_process()) {
    throw Error(
        "the readers of this model's host tier belong to the process that forked this one: create "
        "the manager after the fork, or start workers with the \"spawn\" method");
  }
}

std::size_t default_readers() noexcept {
  return std::clamp<std::size_t>(std::thread::hardware_concurrency(), 1, 8);
}

}  // namespace penstock
