// Bytes that reach memory through pinned buffers: all of them, in pieces, from several threads, and
// no buffer lost where something fails.
#include "device/staging.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "device/host/host_device.hpp"
#include "device/testing/faulty_device.hpp"
#include "support/pager_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr std::size_t kMost = Staging::kBuffers;
constexpr std::size_t kPiece = Staging::kBufferBytes;

struct StagingTest : ::testing::Test {
  std::shared_ptr<FaultyDevice> device =
      std::make_shared<FaultyDevice>(std::make_shared<HostDevice>());
  Staging staging{*device, copying(), copying()};

  Staging::Copy copying() {
    return [this](void* target, const void* source, std::size_t nbytes, StreamHandle stream) {
      device->copy(target, source, nbytes, stream);
    };
  }

  static Staging::Produce from(const Bytes& bytes) {
    return [&bytes](void* buffer, std::size_t offset, std::size_t nbytes) {
      std::memcpy(buffer, bytes.data() + offset, nbytes);
    };
  }
  std::size_t made() const { return device->calls().at("pinned_allocate"); }
  std::size_t freed() const {
    const auto calls = device->calls();
    return calls.count("pinned_free") > 0 ? calls.at("pinned_free") : 0;
  }
};

TEST_F(StagingTest, WritesAndReadsAnySizeInPieces) {
  for (const std::size_t nbytes : {std::size_t{0}, std::size_t{1}, kPiece, 2 * kPiece + 7}) {
    const Bytes bytes = pattern(nbytes, nbytes);
    Bytes target(nbytes);
    staging.write(target.data(), nbytes, from(bytes));
    EXPECT_EQ(target, bytes);
    Bytes back(nbytes);
    staging.read(target.data(), nbytes,
                 [&](const void* buffer, std::size_t offset, std::size_t part) {
                   std::memcpy(back.data() + offset, buffer, part);
                 });
    EXPECT_EQ(back, bytes);
  }
  EXPECT_EQ(made(), 1U);
  EXPECT_EQ(freed(), 0U);
  staging.release();
  EXPECT_EQ(freed(), 1U);
  staging.release();  // nothing is nothing
}

TEST_F(StagingTest, ManyThreadsShareAFewBuffers) {
  constexpr std::size_t kThreads = 3 * kMost;
  std::vector<Bytes> targets(kThreads, Bytes(kPiece / 4 + 1));
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const Bytes bytes = pattern(targets[i].size(), i);
      for (int round = 0; round < 3; ++round) {
        staging.write(targets[i].data(), bytes.size(), from(bytes));
        if (i % kMost == 0) staging.release();  // while others use theirs
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (std::size_t i = 0; i < kThreads; ++i) {
    EXPECT_EQ(targets[i], pattern(targets[i].size(), i)) << i;
  }
  staging.release();
  EXPECT_EQ(made(), freed());
}

TEST_F(StagingTest, NoBufferIsLostWhereACallFails) {
  const Bytes bytes = pattern(1000, 1);
  Bytes target(1000);
  for (const char* call : {"stream_create", "pinned_allocate", "copy", "stream_synchronize"}) {
    for (std::size_t i = 0; i <= kMost; ++i) {  // more often than there are buffers
      staging.release();
      device->fail_nth_call_of(call, 0);
      EXPECT_THROW(staging.write(target.data(), bytes.size(), from(bytes)), DeviceError) << call;
    }
    staging.write(target.data(), bytes.size(), from(bytes));
    EXPECT_EQ(target, bytes);
  }
  for (std::size_t i = 0; i <= kMost; ++i) {
    EXPECT_THROW(
        staging.write(target.data(), bytes.size(),
                      [](void*, std::size_t, std::size_t) { throw std::runtime_error("no"); }),
        std::runtime_error);
  }
  staging.release();
  EXPECT_EQ(device->calls().at("stream_create"), device->calls().at("stream_destroy") + kMost + 1);
}

}  // namespace
}  // namespace penstock
