// Long random sequences, in one thread with every step checked, and in many threads at once.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"
#include "support/ledger_watch.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr PoolId kPool{7, 0};

struct Held {
  unsigned char* address;
  std::size_t nbytes;
  unsigned char seed;
  std::size_t stream;
};

// Sizes as models ask for them: a few over and over, and now and then any.
std::size_t any_size(std::mt19937& random) {
  static constexpr std::size_t kUsual[] = {512,      4096,     100000,       kMiB,
                                           2 * kMiB, 3 * kMiB, 5 * kMiB / 2, 7 * kMiB};
  if (random() % 3 != 0) return kUsual[random() % 8];
  return random() % 2 == 0 ? 1 + random() % kMiB : kMiB + random() % (6 * kMiB);
}

void mark(const Held& held) {
  held.address[0] = held.address[held.nbytes - 1] = held.seed;
  for (std::size_t i = 0; i < held.nbytes; i += 4096) held.address[i] = held.seed;
}
bool is_marked(const Held& held) {
  for (std::size_t i = 0; i < held.nbytes; i += 4096) {
    if (held.address[i] != held.seed) return false;
  }
  return held.address[held.nbytes - 1] == held.seed;
}

class RandomSteps : public ::testing::TestWithParam<unsigned> {};

TEST_P(RandomSteps, LedgerIsThatOfTheFramesAndBlocksKeepTheirBytesAtEachStep) {
  std::mt19937 random(GetParam());
  AllocatorSetup setup(20, {8 * kFrame, 16 * kFrame});
  CachingAllocator& allocator = *setup.allocator;
  const OwnedStream streams[] = {OwnedStream(setup.spy), OwnedStream(setup.spy)};
  const StreamHandle handles[] = {kHere, streams[0].get(), streams[1].get()};
  std::vector<Held> live;
  enum : std::uint8_t { kIdle, kBegun, kEnded } pool = kIdle;
  std::size_t requested = 0;
  for (int step = 0; step < 1500; ++step) {
    const auto action = random() % 100;
    if (action < 50) {
      const std::size_t nbytes = any_size(random);
      const std::size_t stream = random() % 3;
      try {
        auto* address = static_cast<unsigned char*>(allocator.allocate(nbytes, handles[stream]));
        live.push_back({address, nbytes, static_cast<unsigned char>(random()), stream});
        mark(live.back());
        requested += nbytes;
      } catch (const CapExceededError&) {
        EXPECT_GT(setup.used_frames(), 10U);
      }
    } else if (action < 90 && !live.empty()) {
      const std::size_t at = random() % live.size();
      ASSERT_TRUE(is_marked(live[at])) << step;
      if (random() % 4 == 0) allocator.record_stream(live[at].address, handles[random() % 3]);
      allocator.free(live[at].address);
      requested -= live[at].nbytes;
      live[at] = live.back();
      live.pop_back();
    } else if (action < 92) {
      allocator.give_back(random() % (4 * kFrame));
    } else if (action < 93) {
      allocator.empty_cache();
    } else if (action < 96) {
      static_cast<void>(setup.budget->try_set_cap((12 + random() % 12) * kFrame));
    } else if (pool == kIdle) {
      allocator.begin_pool(kPool, [&](StreamHandle s) { return s.value == handles[1].value; });
      pool = kBegun;
    } else if (pool == kBegun) {
      allocator.end_pool(kPool);
      pool = kEnded;
    } else {
      allocator.release_pool(kPool);
      pool = kIdle;
    }
    ASSERT_TRUE(setup.balanced()) << step;
    ASSERT_LE(setup.budget->stats().used, setup.budget->cap()) << step;
    const AllocatorStats stats = allocator.stats();
    ASSERT_EQ(static_cast<std::size_t>(stats.side(Side::kAll).allocation.current), live.size());
    ASSERT_GE(static_cast<std::size_t>(stats.side(Side::kAll).requested_bytes.current), requested);
  }
  for (const Held& held : live) {
    EXPECT_TRUE(is_marked(held));
    allocator.free(held.address);
  }
  if (pool == kBegun) allocator.end_pool(kPool);
  if (pool != kIdle) allocator.release_pool(kPool);
  setup.spy->synchronize();
  allocator.empty_cache();
  EXPECT_EQ(setup.used_frames(), 0U);
  EXPECT_EQ(allocator.stats().side(Side::kAll).active.current, 0);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomSteps, ::testing::Range(0U, 12U));

TEST(AllocatorThreads, BlocksOfManyThreadsAndStreamsKeepTheirBytes) {
  constexpr int kThreads = 6;
  AllocatorSetup setup(24);
  CachingAllocator& allocator = *setup.allocator;
  LateWriter writer;
  std::vector<std::unique_ptr<OwnedStream>> streams;
  for (int i = 0; i < 3; ++i) streams.push_back(std::make_unique<OwnedStream>(setup.spy));
  std::atomic<int> served{0};
  {
    const LedgerWatch watch(*setup.budget);
    std::vector<std::thread> threads;
    for (int id = 0; id < kThreads; ++id) {
      threads.emplace_back([&, id] {
        std::mt19937 random(static_cast<unsigned>(id));
        std::vector<void*> live;
        const StreamHandle stream = streams[static_cast<std::size_t>(id) % 3]->get();
        const StreamHandle other = streams[static_cast<std::size_t>(id + 1) % 3]->get();
        for (int step = 0; step < 300; ++step) {
          if (live.size() < 4 && random() % 2 == 0) {
            const std::size_t nbytes = any_size(random);
            try {
              live.push_back(allocator.allocate(nbytes, stream));
            } catch (const CapExceededError&) {
              continue;
            }
            ++served;
            writer.write(live.back(), std::min(nbytes, std::size_t{20000}), stream,
                         std::chrono::microseconds(random() % 200));
          } else if (!live.empty()) {
            if (random() % 4 == 0) {
              const OwnedEvent ready(setup.spy);
              setup.spy->event_record(ready.get(), stream);
              setup.spy->event_wait(other, ready.get());
              allocator.record_stream(live.back(), other);
              writer.write(live.back(), 512, other, std::chrono::microseconds(random() % 200));
            }
            allocator.free(live.back());
            live.pop_back();
          }
          if (random() % 40 == 0) allocator.give_back(kFrame);
        }
        for (void* block : live) allocator.free(block);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  setup.spy->synchronize();
  EXPECT_EQ(writer.wrong(), 0U);
  EXPECT_GT(served, 100);
  EXPECT_TRUE(setup.balanced());
  allocator.empty_cache();
  EXPECT_EQ(setup.used_frames(), 0U);
}

// Each of two needs more than half of what there is, and frames that the other one has left cached:
// both at once cannot have it, but one of them always can.
TEST(AllocatorThreads, OfRequestsThatDoNotFitTogetherOneIsServed) {
  AllocatorSetup setup(8);
  const OwnedStream first(setup.spy);
  const OwnedStream second(setup.spy);
  const StreamHandle streams[] = {first.get(), second.get()};
  setup.device->delay_calls_of("event_synchronize", std::chrono::microseconds(300));
  for (int round = 0; round < 50; ++round) {
    // Each finds half of the frames where it wants them, and half of them with the other one.
    setup.allocator->empty_cache();
    for (const StreamHandle stream : streams) setup.allocator->free(setup.take(4 * kFrame, stream));
    std::atomic<int> ready{0};
    void* blocks[] = {nullptr, nullptr};
    std::vector<std::thread> threads;
    for (std::size_t id = 0; id < 2; ++id) {
      threads.emplace_back([&, id] {
        ++ready;
        while (ready < 2) std::this_thread::yield();
        try {
          blocks[id] = setup.take(6 * kFrame, streams[id]);
        } catch (const CapExceededError&) {
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_NE(blocks[0] == nullptr, blocks[1] == nullptr) << round;
    for (void* block : blocks) setup.allocator->free(block);
    ASSERT_TRUE(setup.balanced());
  }
}

// Somebody like a region: frames under a mutex of its own, which it holds while it gives and while
// it works, but not while it asks.
class LockedSource : public RoomSource {
 public:
  LockedSource(std::shared_ptr<FramePool> pool, CachingAllocator& allocator)
      : pool_(std::move(pool)), allocator_(allocator) {}

  std::size_t give_back(std::size_t nbytes) override {
    const std::lock_guard lock(mutex_);
    std::size_t given = 0;
    while (given < nbytes && !frames_.empty()) {
      frames_.pop_back();
      given += kFrame;
    }
    return given;
  }
  /// Takes a frame, asking others for room where there is none.
  void grow() {
    for (int i = 0; i < 4; ++i) {
      {
        const std::lock_guard lock(mutex_);
        if (auto frame = pool_->try_take(Tag::kWeights)) {
          frames_.push_back(std::move(*frame));
          return;
        }
      }
      if (!pool_->make_room(kFrame, this)) return;
    }
  }
  /// Allocates as well, as a region's scratch memory would be.
  void work(StreamHandle stream) {
    try {
      allocator_.free(allocator_.allocate(3 * kMiB, stream));
    } catch (const CapExceededError&) {
    }
    const std::lock_guard lock(mutex_);
  }
  void clear() {
    const std::lock_guard lock(mutex_);
    frames_.clear();
  }

 private:
  std::shared_ptr<FramePool> pool_;
  CachingAllocator& allocator_;
  std::mutex mutex_;
  std::vector<Frame> frames_;
};

TEST(AllocatorThreads, SourcesWithLocksOfTheirOwnAndTheAllocatorDoNotWaitForEachOther) {
  AllocatorSetup setup(8);
  const OwnedStream stream(setup.spy);
  const auto source = std::make_shared<LockedSource>(setup.pool, *setup.allocator);
  setup.pool->add_source(source, RoomRank::kResidentSet);
  std::vector<std::unique_ptr<Running>> running;
  for (int id = 0; id < 4; ++id) {
    running.push_back(std::make_unique<Running>([&, id] {
      for (int i = 0; i < 200; ++i) {
        if (id == 0) {
          source->grow();
        } else if (id == 1) {
          source->work(stream.get());
        } else {
          try {
            setup.allocator->free(setup.take((id == 2 ? 3 : 1) * kFrame));
          } catch (const CapExceededError&) {
          }
        }
      }
    }));
  }
  for (const auto& thread : running) {
    ASSERT_TRUE(eventually([&] { return thread->ended(); }));
    thread->join();
  }
  source->clear();
  EXPECT_TRUE(setup.balanced());
}

// A source that allocates while it is asked: the request inside is served or refused, at once.
TEST(AllocatorThreads, SourceMayAllocateWhileItGives) {
  class Allocating : public RoomSource {
   public:
    explicit Allocating(CachingAllocator& allocator) : allocator_(allocator) {}
    std::size_t give_back(std::size_t /*nbytes*/) override {
      const std::lock_guard lock(mutex_);
      ++asked;
      EXPECT_THROW(allocator_.allocate(2 * kFrame, kHere), CapExceededError);
      allocator_.free(allocator_.allocate(100, kHere));
      return 0;
    }
    int asked = 0;

   private:
    CachingAllocator& allocator_;
    std::mutex mutex_;
  };
  AllocatorSetup setup(2);
  const auto source = std::make_shared<Allocating>(*setup.allocator);
  setup.pool->add_source(source, RoomRank::kRing);
  setup.take(kFrame);
  setup.take(100);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THROW(setup.take(kFrame), CapExceededError);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(900));
  EXPECT_EQ(source->asked, 1);
}

}  // namespace
}  // namespace penstock
