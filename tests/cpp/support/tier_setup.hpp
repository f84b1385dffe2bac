// A host tier of each kind on the host device, over files that a test lays out, and what its bytes
// have to be.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device/testing/faulty_device.hpp"
#include "host_tier/mapped_tier.hpp"
#include "host_tier/pinned_tier.hpp"
#include "host_tier/stream_tier.hpp"
#include "support/files.hpp"
#include "support/spying_device.hpp"

namespace penstock::testing {

inline constexpr std::size_t kTierPage = std::size_t{16} << 10;

/// A model on disk: its source, the bytes that files and writes give it, and which were given.
struct TestModel {
  Source source;
  Bytes bytes;
  std::vector<bool> given;
  struct Write {
    std::size_t offset;
    std::size_t nbytes;
  };
  std::vector<Write> writes;  // what no file has
};

/// Extents of any size at any offset of several files, with gaps; every third gap is written.
inline TestModel random_model(const TemporaryDirectory& directory, std::size_t seed,
                              std::size_t nbytes) {
  std::mt19937_64 random(seed);
  const auto below = [&](std::size_t limit) { return static_cast<std::size_t>(random() % limit); };
  TestModel model;
  model.bytes = pattern(nbytes, seed + 1000);  // what nobody gives is compared with nothing
  model.given.assign(nbytes, false);
  std::vector<Bytes> files;
  for (std::size_t i = 0; i < 3; ++i) {
    files.push_back(pattern(nbytes + below(9000), seed * 10 + i));
    model.source.paths.push_back(
        directory.write("model" + std::to_string(seed) + "-" + std::to_string(i), files.back()));
  }
  std::vector<std::size_t> cursor(files.size(), 0);
  for (std::size_t at = below(100); at < nbytes;) {
    const std::size_t size = std::min(nbytes - at, below(4) == 0 ? below(40000) : below(3000));
    const std::size_t file = below(files.size());
    std::size_t offset = cursor[file];  // often goes on in its file, as checkpoints do
    if (below(3) == 0 || offset + size > files[file].size()) {
      offset = below(files[file].size() - size + 1);
    }
    cursor[file] = offset + size;
    model.source.extents.push_back({file, offset, at, size});
    std::copy_n(files[file].begin() + static_cast<std::ptrdiff_t>(offset), size,
                model.bytes.begin() + static_cast<std::ptrdiff_t>(at));
    std::fill_n(model.given.begin() + static_cast<std::ptrdiff_t>(at), size, true);
    at += size;
    const std::size_t gap = below(3) == 0 ? below(700) : 0;
    const std::size_t end = std::min(nbytes, at + gap);
    if (gap > 0 && end > at && below(3) == 0) {
      model.writes.push_back({at, end - at});
      std::fill_n(model.given.begin() + static_cast<std::ptrdiff_t>(at), end - at, true);
    }
    at = end;
  }
  return model;
}

/// A model of one file, page after page; `skew` shifts it in the file.
inline TestModel simple_model(const TemporaryDirectory& directory, std::size_t pages,
                              std::size_t skew = 8) {
  TestModel model;
  const Bytes file = pattern(pages * kTierPage + skew, 77);
  model.source = {{directory.write("simple", file)}, {{0, skew, 0, pages * kTierPage}}};
  model.bytes.assign(file.begin() + static_cast<std::ptrdiff_t>(skew), file.end());
  model.given.assign(model.bytes.size(), true);
  return model;
}

struct TierSetup {
  std::shared_ptr<SpyingDevice> spy = std::make_shared<SpyingDevice>();
  std::shared_ptr<FaultyDevice> device = std::make_shared<FaultyDevice>(spy);

  std::unique_ptr<HostTier> make(const std::string& kind, const TestModel& model,
                                 std::size_t page_size = kTierPage, std::size_t threads = 3) {
    const std::size_t nbytes = model.bytes.size();
    if (kind == "pinned") {
      return std::make_unique<PinnedTier>(device, nbytes, page_size, model.source, threads);
    }
    if (kind == "mapped") {
      return std::make_unique<MappedTier>(device, nbytes, page_size, model.source,
                                          std::chrono::seconds(60), threads);
    }
    return std::make_unique<StreamTier>(device, nbytes, page_size, model.source, 3 * page_size,
                                        threads);
  }

  std::shared_ptr<OwnedEvent> event_now(StreamHandle stream = {}) {
    auto event = std::make_shared<OwnedEvent>(device);
    device->event_record(event->get(), stream);
    return event;
  }

  /// Whether all that was registered and allocated was given back.
  void expect_nothing_held(std::uint64_t failed_registers = 0, std::uint64_t failed_pins = 0) {
    auto calls = device->calls();
    EXPECT_EQ(calls["host_register"], calls["host_unregister"] + failed_registers);
    EXPECT_EQ(calls["pinned_allocate"], calls["pinned_free"] + failed_pins);
    EXPECT_EQ(calls["event_create"], calls["event_destroy"]);
  }
};

inline void write_gaps(HostTier& tier, const TestModel& model) {
  for (const auto& [offset, nbytes] : model.writes) {
    tier.write(offset, model.bytes.data() + offset, nbytes);
  }
}

/// Whether the pieces ascend inside the page and give every byte that was given.
inline ::testing::AssertionResult page_is(const std::vector<Piece>& pieces, PageIndex page,
                                          std::size_t page_size, const TestModel& model) {
  const std::size_t start = page * page_size;
  const std::size_t nbytes = std::min(page_size, model.bytes.size() - start);
  std::vector<bool> seen(nbytes, false);
  std::size_t end = 0;
  for (const Piece& piece : pieces) {
    if (piece.offset < end || piece.offset + piece.nbytes > nbytes) {
      return ::testing::AssertionFailure() << "page " << page << ": piece at " << piece.offset;
    }
    end = piece.offset + piece.nbytes;
    for (std::size_t i = 0; i < piece.nbytes; ++i) {
      const std::size_t at = start + piece.offset + i;
      seen[piece.offset + i] = true;
      if (model.given[at] && std::to_integer<unsigned char>(piece.source[i]) != model.bytes[at]) {
        return ::testing::AssertionFailure() << "page " << page << ": wrong byte at " << at;
      }
    }
  }
  for (std::size_t i = 0; i < nbytes; ++i) {
    if (model.given[start + i] && !seen[i]) {
      return ::testing::AssertionFailure() << "page " << page << ": no byte at " << start + i;
    }
  }
  return ::testing::AssertionSuccess();
}

/// Fetches a page, compares it, and releases it.
inline ::testing::AssertionResult fetched_is(TierSetup& setup, HostTier& tier, PageIndex page,
                                             const TestModel& model) {
  auto result = page_is(tier.fetch(page), page, tier.page_size(), model);
  tier.release(page, setup.event_now());
  return result;
}

}  // namespace penstock::testing
