// A million random operations against a model of what has to be true: requests, frees, streams,
// steps of a model whose weights give way, memory that overflows to the host, changes of the cap
// and of the limit, and device calls that fail. After each of them the tags of the ledger add up to
// what is used, that is at most the cap, and it is the frames that exist.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr std::size_t kSmallFrame = std::size_t{64} << 10;
constexpr int kOperations = 250000;  // for each seed
constexpr unsigned kSeeds = 4;

/// Frames of a model: what its step reads stays, the others are there to be taken.
class Weights : public RoomSource {
 public:
  explicit Weights(std::shared_ptr<FramePool> pool) : pool_(std::move(pool)) {}

  /// Has `count` frames for a step, as far as there is room for them.
  void begin_step(std::size_t count) {
    in_use_ = std::min(count, frames_.size());
    while (in_use_ < count) {
      std::optional<Frame> frame = pool_->try_take(Tag::kWeights);
      if (!frame) {
        if (!pool_->make_room(kSmallFrame, this)) return;
        continue;
      }
      frames_.push_back(std::move(*frame));
      ++in_use_;
    }
  }
  void end_step() { in_use_ = 0; }

  std::size_t give_back(std::size_t nbytes) override {
    std::size_t given = 0;
    for (; given < nbytes && loose() > 0; given += kSmallFrame) frames_.pop_back();
    return given;
  }
  std::size_t loose() const { return frames_.size() - in_use_; }
  std::size_t frames() const { return frames_.size(); }

 private:
  std::shared_ptr<FramePool> pool_;
  std::vector<Frame> frames_;
  std::size_t in_use_ = 0;  // the first ones
};

/// Counts frames, and looks at each that is made whether the ledger knew of it before.
class WatchedDevice : public SpyingDevice {
 public:
  FrameHandle frame_create(std::size_t nbytes) override {
    const FrameHandle frame = SpyingDevice::frame_create(nbytes);
    EXPECT_LE(static_cast<std::size_t>(frames()) * nbytes, budget->stats().used);
    return frame;
  }
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(48 * kSmallFrame);
};

class Machine {
 public:
  explicit Machine(unsigned seed) : random_(seed) {
    pool_->add_source(weights_, RoomRank::kResidentSet);
  }

  void step() {
    const auto action = random_() % 1000;
    try {
      if (action < 470) {
        allocate();
      } else if (action < 940) {
        free_any();
      } else if (action < 960) {
        weights_->begin_step(random_() % 24);
      } else if (action < 975) {
        weights_->end_step();
      } else if (action < 983) {
        allocator_->give_back(random_() % (4 * kSmallFrame));
      } else if (action < 984) {
        allocator_->empty_cache();
      } else if (action < 992) {
        change_cap();
      } else if (action < 993) {
        allocator_->overflow().set_limit(random_() % 3 * (2 * kMiB));
      } else {
        device_->fail_nth_call(random_() % 30);
        armed_ = true;
      }
    } catch (const DeviceError&) {
      EXPECT_TRUE(armed_) << "nothing was made to fail";
    }
    if (armed_ && device_->fired()) armed_ = false;
    check();
  }

  void finish() {
    device_->reset();
    while (!live_.empty()) free_any();
    weights_->end_step();
    spy_->synchronize();
    allocator_->empty_cache();
    weights_->give_back(weights_->frames() * kSmallFrame);
    EXPECT_EQ(budget().stats().used, 0U);
    EXPECT_EQ(spy_->frames(), 0);
    EXPECT_EQ(allocator_->stats().side(Side::kAll).active.current, 0);
    EXPECT_EQ(allocator_->overflow().stats().held, 0U);
    EXPECT_GT(overflowed_, 100U);
    EXPECT_GT(refused_, 100U);
  }

 private:
  struct Held {
    std::size_t nbytes;
    unsigned char mark;
  };

  Budget& budget() { return *spy_->budget; }

  std::size_t any_size() {
    static constexpr std::size_t kUsual[] = {512,        4096, 40000, kSmallFrame, 5 * kSmallFrame,
                                             kMiB + 4096};
    return random_() % 4 != 0 ? kUsual[random_() % std::size(kUsual)]
                              : 1 + random_() % (random_() % 8 == 0 ? 3 * kMiB / 2 : 100000);
  }

  void allocate() {
    const std::size_t nbytes = any_size();
    const std::size_t before = allocator_->overflow().stats().live;
    try {
      void* address = allocator_->allocate(nbytes, streams_[random_() % std::size(streams_)]);
      if (allocator_->overflow().stats().live > before) ++overflowed_;
      add(static_cast<unsigned char*>(address), nbytes);
    } catch (const CapExceededError& error) {
      EXPECT_EQ(error.requested, nbytes);
      if (armed_) return;  // what failed may have kept room from being made
      ++refused_;
      EXPECT_LT(budget().available(), nbytes);
      if (nbytes <= budget().cap()) {
        EXPECT_EQ(weights_->loose(), 0U);
      }
    }
  }

  void add(unsigned char* address, std::size_t nbytes) {
    const auto after = live_.lower_bound(address);
    if (after != live_.end()) {
      EXPECT_LE(address + nbytes, after->first);
    }
    if (after != live_.begin()) {
      const auto before = std::prev(after);
      EXPECT_LE(before->first + before->second.nbytes, address);
    }
    const auto mark = static_cast<unsigned char>(random_());
    address[0] = address[nbytes - 1] = mark;
    live_.emplace_hint(after, address, Held{nbytes, mark});
    addresses_.push_back(address);
  }

  void free_any() {
    if (addresses_.empty()) return;
    std::swap(addresses_[random_() % addresses_.size()], addresses_.back());
    unsigned char* address = addresses_.back();
    const Held held = live_.at(address);
    EXPECT_EQ(address[0], held.mark);
    EXPECT_EQ(address[held.nbytes - 1], held.mark);
    if (random_() % 16 == 0) allocator_->record_stream(address, streams_[random_() % 3]);
    live_.erase(address);
    addresses_.pop_back();
    allocator_->free(address);
  }

  void change_cap() {
    const std::size_t cap = (16 + random_() % 48) * kSmallFrame;
    const bool fits = budget().stats().used <= cap;
    EXPECT_EQ(budget().try_set_cap(cap), fits);
  }

  void check() {
    const BudgetStats ledger = budget().stats();
    const auto& tags = ledger.used_by_tag;
    ASSERT_EQ(std::accumulate(tags.begin(), tags.end(), std::size_t{0}), ledger.used);
    ASSERT_LE(ledger.used, ledger.cap);
    ASSERT_EQ(ledger.used, static_cast<std::size_t>(spy_->frames()) * kSmallFrame);
    ASSERT_EQ(tags[static_cast<std::size_t>(Tag::kWeights)], weights_->frames() * kSmallFrame);
    if (++checks_ % 32 != 0) return;
    const SideStats all = allocator_->stats().side(Side::kAll);
    const OverflowStats overflow = allocator_->overflow().stats();
    ASSERT_EQ(static_cast<std::size_t>(all.allocation.current), live_.size());
    ASSERT_EQ(static_cast<std::size_t>(all.reserved_bytes.current) - overflow.live,
              tags[static_cast<std::size_t>(Tag::kActivations)]);
    ASSERT_LE(overflow.live, overflow.held);
    ASSERT_LE(overflow.held, 4 * kMiB);
  }

  std::mt19937 random_;
  std::shared_ptr<WatchedDevice> spy_ = std::make_shared<WatchedDevice>();
  std::shared_ptr<FaultyDevice> device_ = std::make_shared<FaultyDevice>(spy_);
  std::shared_ptr<FramePool> pool_ = FramePool::create(device_, spy_->budget, kSmallFrame);
  OwnedStream first_{spy_};
  OwnedStream second_{spy_};
  StreamHandle streams_[3] = {kHere, first_.get(), second_.get()};
  std::shared_ptr<Weights> weights_ = std::make_shared<Weights>(pool_);
  std::shared_ptr<CachingAllocator> allocator_ =
      CachingAllocator::create(pool_, {64 * kSmallFrame, 128 * kSmallFrame});
  std::map<unsigned char*, Held> live_;
  std::vector<unsigned char*> addresses_;  // of `live_`, in any order
  bool armed_ = false;
  std::size_t overflowed_ = 0;
  std::size_t refused_ = 0;
  std::size_t checks_ = 0;
};

class AllocatorMachine : public ::testing::TestWithParam<unsigned> {};

TEST_P(AllocatorMachine, CapHoldsAfterEachOfManyOperations) {
  Machine machine(GetParam());
  for (int i = 0; i < kOperations; ++i) {
    machine.step();
    ASSERT_FALSE(HasFailure()) << "operation " << i;
  }
  machine.finish();
}

INSTANTIATE_TEST_SUITE_P(Seeds, AllocatorMachine, ::testing::Range(0U, kSeeds));

}  // namespace
}  // namespace penstock
