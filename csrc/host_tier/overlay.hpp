// The bytes of a tier that no file has (buffers that were computed, tensors from memory), packed in
// pinned memory: nothing is allocated for what was not written. Bytes written are in place for
// good; writing them again replaces them. Thread-safe; whoever copies from the addresses sees to it
// that nobody writes meanwhile.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "device/device.hpp"
#include "host_tier/host_tier.hpp"

namespace penstock {

class Overlay {
 public:
  explicit Overlay(std::shared_ptr<Device> device);
  ~Overlay();
  Overlay(const Overlay&) = delete;
  Overlay& operator=(const Overlay&) = delete;

  /// @throws DeviceError where there is no pinned memory; some bytes may then be in place.
  void write(std::size_t offset, const std::byte* source, std::size_t nbytes);
  /// Copies what was written of a range; the rest of the target stays.
  void read(std::size_t offset, std::byte* target, std::size_t nbytes) const;
  /// What was written of a range, ascending; offsets count from its start.
  std::vector<Piece> pieces(std::size_t offset, std::size_t nbytes) const;
  std::size_t pinned_bytes() const;

 private:
  struct Run {
    std::byte* address;
    std::size_t nbytes;
  };
  struct Chunk {
    std::byte* address;
    std::size_t nbytes;
  };
  std::byte* take(std::size_t nbytes);
  void add(std::size_t offset, const std::byte* source, std::size_t nbytes);
  template <typename Visit>
  void visit(std::size_t offset, std::size_t nbytes, Visit visit) const;

  std::shared_ptr<Device> device_;
  mutable std::mutex mutex_;
  std::map<std::size_t, Run> runs_;  // by offset; they do not overlap
  std::vector<Chunk> chunks_;
  std::size_t left_ = 0;  // bytes at the end of the last chunk that are free
};

/// The pieces of both, ascending by offset.
std::vector<Piece> merge_pieces(std::vector<Piece> pieces, const std::vector<Piece>& others);

}  // namespace penstock
