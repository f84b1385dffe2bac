#include "host_tier/checksums.hpp"

#include <array>
#include <cstring>
#include <string>

#include "error/error.hpp"

namespace penstock {

namespace {

constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15U;

// One to one in either argument while the other stays: so one word that differs is never lost.
std::uint64_t mix(std::uint64_t sum, std::uint64_t word) noexcept {
  sum = (sum ^ word) * kOdd;
  return sum ^ (sum >> 29);
}

}  // namespace

std::uint64_t checksum(const std::byte* bytes, std::size_t nbytes) noexcept {
  std::array<std::uint64_t, 4> sums{1, 2, 3, 4};  // side by side: each waits for itself alone
  std::array<std::uint64_t, 4> words{};
  std::size_t done = 0;
  for (; nbytes - done >= sizeof(words); done += sizeof(words)) {
    std::memcpy(words.data(), bytes + done, sizeof(words));
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = mix(sums[i], words[i]);
  }
  words = {};
  if (done < nbytes) std::memcpy(words.data(), bytes + done, nbytes - done);
  std::uint64_t sum = nbytes;
  for (std::size_t i = 0; i < sums.size(); ++i) sum = mix(sum, mix(sums[i], words[i]));
  return sum;
}

void Checksums::verify(const OpenSource& source, std::size_t offset, const std::byte* bytes,
                       std::size_t nbytes) {
  for (const Extent& part : source.parts(offset, nbytes)) {
    const std::uint64_t sum = checksum(bytes + (part.region_offset - offset), part.nbytes);
    const auto [known, is_new] = sums_.emplace(part.region_offset, sum);
    if (is_new || known->second == sum) continue;
    const File& file = source.file(part.file);
    throw CheckpointError(
        file.path() + " was changed while its weights were in use: " + std::to_string(part.nbytes) +
            " bytes at byte " + std::to_string(part.file_offset) +
            " are not those that were loaded before, though its size and time are the same. "
            "Unregister the model and register it again, or use host=\"pinned\", which keeps a "
            "copy",
        file.path(), part.file_offset);
  }
}

}  // namespace penstock
