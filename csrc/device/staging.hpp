// A few pinned buffers through which bytes reach memory that the process itself is not to touch: a
// caller writes a piece into a buffer, the device copies it on. Buffers are made when they are
// first needed, and go when the owner says that it is done for now. Thread-safe; callers beyond
// the number of buffers wait for one.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#include "device/device.hpp"

namespace penstock {

class Staging {
 public:
  static constexpr std::size_t kBuffers = 4;
  static constexpr std::size_t kBufferBytes = std::size_t{16} << 20;

  /// Writes bytes [offset, offset + nbytes) of what is copied into `buffer`.
  using Produce = std::function<void(void* buffer, std::size_t offset, std::size_t nbytes)>;
  /// Takes bytes [offset, offset + nbytes) out of `buffer`.
  using Consume = std::function<void(const void* buffer, std::size_t offset, std::size_t nbytes)>;

  /// Copies as work of a stream.
  using Copy = std::function<void(void* target, const void* source, std::size_t nbytes,
                                  StreamHandle stream)>;

  /// @param device  Outlives this.
  /// @param in, out  How the device copies from a buffer, and to one.
  Staging(Device& device, Copy in, Copy out)
      : device_(device), in_(std::move(in)), out_(std::move(out)) {}
  ~Staging() { release(); }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// Copies `nbytes` to `target`, piece by piece. Blocks until they are there.
  /// @throws what `produce` throws, and errors of the device.
  void write(void* target, std::size_t nbytes, const Produce& produce);
  /// Copies `nbytes` from `source`, piece by piece.
  void read(const void* source, std::size_t nbytes, const Consume& consume);

  /// Gives the buffers back that nobody uses.
  void release() noexcept;

 private:
  struct Buffer {
    void* address = nullptr;
    StreamHandle stream;
  };

  Buffer take();
  Buffer make();
  void give(const Buffer& buffer);
  void free(const Buffer& buffer) noexcept;
  /// A call whose error has nowhere to go.
  void attempt(const std::function<void()>& call) noexcept;
  using Piece = std::function<void(const Buffer& buffer, std::size_t offset, std::size_t nbytes)>;
  void for_each_piece(std::size_t nbytes, const Piece& run);

  Device& device_;
  Copy in_;
  Copy out_;
  std::mutex mutex_;
  std::condition_variable given_;
  std::vector<Buffer> idle_;
  std::size_t made_ = 0;
};

}  // namespace penstock
