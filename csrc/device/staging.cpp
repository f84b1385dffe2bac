#include "device/staging.hpp"

#include <algorithm>
#include <exception>

namespace penstock {

Staging::Buffer Staging::make() {
  Buffer buffer;
  buffer.stream = device_.stream_create();
  try {
    buffer.address = device_.pinned_allocate(kBufferBytes);
  } catch (...) {
    free(buffer);
    throw;
  }
  return buffer;
}

Staging::Buffer Staging::take() {
  std::unique_lock lock(mutex_);
  idle_.reserve(kBuffers);  // so that giving one back cannot fail
  given_.wait(lock, [&] { return !idle_.empty() || made_ < kBuffers; });
  if (!idle_.empty()) {
    const Buffer buffer = idle_.back();
    idle_.pop_back();
    return buffer;
  }
  ++made_;
  lock.unlock();
  try {
    return make();
  } catch (...) {
    lock.lock();
    --made_;
    lock.unlock();
    given_.notify_one();
    throw;
  }
}

void Staging::give(const Buffer& buffer) {
  {
    const std::lock_guard lock(mutex_);
    idle_.push_back(buffer);
  }
  given_.notify_one();
}

void Staging::attempt(const std::function<void()>& call) noexcept {
  try {
    call();
  } catch (const std::exception& error) {
    device_.suppress(error.what());
  }
}

void Staging::free(const Buffer& buffer) noexcept {
  if (buffer.address != nullptr) {
    attempt([&] { device_.pinned_free(buffer.address, kBufferBytes); });
  }
  attempt([&] { device_.stream_destroy(buffer.stream); });
}

void Staging::release() noexcept {
  std::vector<Buffer> idle;
  {
    const std::lock_guard lock(mutex_);
    idle.swap(idle_);
    made_ -= idle.size();
  }
  for (const Buffer& buffer : idle) free(buffer);
  given_.notify_all();
}

void Staging::for_each_piece(std::size_t nbytes, const Piece& run) {
  if (nbytes == 0) return;
  const Buffer buffer = take();
  try {
    for (std::size_t done = 0; done < nbytes; done += kBufferBytes) {
      run(buffer, done, std::min(kBufferBytes, nbytes - done));
    }
  } catch (...) {
    attempt([&] { device_.stream_synchronize(buffer.stream); });  // a copy may still use the buffer
    give(buffer);
    throw;
  }
  give(buffer);
}

void Staging::write(void* target, std::size_t nbytes, const Produce& produce) {
  for_each_piece(nbytes, [&](const Buffer& buffer, std::size_t offset, std::size_t part) {
    produce(buffer.address, offset, part);
    in_(static_cast<std::byte*>(target) + offset, buffer.address, part, buffer.stream);
    device_.stream_synchronize(buffer.stream);
  });
}

void Staging::read(const void* source, std::size_t nbytes, const Consume& consume) {
  for_each_piece(nbytes, [&](const Buffer& buffer, std::size_t offset, std::size_t part) {
    out_(buffer.address, static_cast<const std::byte*>(source) + offset, part, buffer.stream);
    device_.stream_synchronize(buffer.stream);
    consume(buffer.address, offset, part);
  });
}

}  // namespace penstock
