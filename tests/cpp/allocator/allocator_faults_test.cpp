// Every device call of the allocator made to fail at every position: what fails says so, the ledger
// stays that of the frames that exist, and the allocator goes on working.
#include <gtest/gtest.h>

#include <future>
#include <map>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "support/allocator_setup.hpp"

namespace penstock {
namespace {

using namespace testing;

constexpr PoolId kPool{1, 0};

// Uses all that the allocator can do at a cap of six frames; goes on after a failed request.
class Scenario {
 public:
  explicit Scenario(AllocatorSetup& setup) : setup_(setup) {}

  void run() {
    CachingAllocator& allocator = *setup_.allocator;
    const StreamHandle first = first_.get();
    const StreamHandle second = second_.get();
    void* a = take(3 * kFrame, first);
    void* b = take(1000, first);
    void* c = take(kFrame, second);
    drop(a);
    drop(c);
    void* d = take(3 * kFrame, second);  // frames from the first stream
    record(d, first, second);
    drop(d);
    void* e = take(4 * kFrame, first);  // waits for what is held
    drop(e);
    attempt([&] { allocator.give_back(2 * kFrame); });
    attempt([&] {
      allocator.begin_pool(kPool, [first](StreamHandle s) { return s.value == first.value; });
    });
    void* f = take(2 * kFrame, first);
    attempt([&] { allocator.end_pool(kPool); });
    drop(f);
    attempt([&] { allocator.release_pool(kPool); });
    void* g = take(5 * kFrame, second);  // frames of the pool
    drop(g);
    drop(b);
    attempt([&] { allocator.empty_cache(); });
  }
  int failures() const { return failures_; }
  LateWriter writer;

 private:
  template <typename Call>
  void attempt(Call call) {
    try {
      call();
    } catch (const DeviceError& error) {
      ++failures_;
      EXPECT_NE(std::string(error.what()).find("injected"), std::string::npos);
    } catch (const CapExceededError&) {
    }
    EXPECT_TRUE(setup_.balanced());
  }
  void* take(std::size_t nbytes, StreamHandle stream) {
    void* block = nullptr;
    attempt([&] { block = setup_.take(nbytes, stream); });
    if (block != nullptr) writer.write(block, nbytes, stream, std::chrono::microseconds(200));
    return block;
  }
  // Uses a block on a stream, after what another one does with it now.
  void record(void* block, StreamHandle stream, StreamHandle owner) {
    if (block == nullptr) return;
    attempt([&] { setup_.allocator->record_stream(block, stream); });
    setup_.spy->event_record(ready_.get(), owner);
    setup_.spy->event_wait(stream, ready_.get());
    writer.write(block, 512, stream);
  }
  void drop(void* block) {
    attempt([&] { setup_.allocator->free(block); });
  }

  AllocatorSetup& setup_;
  OwnedStream first_{setup_.spy};
  OwnedStream second_{setup_.spy};
  OwnedEvent ready_{setup_.spy};
  int failures_ = 0;
};

TEST(AllocatorFaults, EveryCallFailingAtEveryPositionLeavesItUsable) {
  std::map<std::string, int> seen;
  for (std::uint64_t position = 0;; ++position) {
    AllocatorSetup setup(6);
    Scenario scenario(setup);
    setup.device->fail_nth_call(position);
    scenario.run();
    const bool fired = setup.device->fired();
    setup.device->reset();
    EXPECT_LE(scenario.failures(), 1) << position;
    // All that was not given back is to be had.
    setup.spy->synchronize();
    EXPECT_NO_THROW(setup.allocator->free(setup.take(6 * kFrame))) << position;
    setup.allocator->empty_cache();
    EXPECT_TRUE(setup.balanced()) << position;
    EXPECT_EQ(setup.used_frames(), 0U) << position;
    EXPECT_EQ(setup.spy->frames(), 0) << position;
    EXPECT_EQ(scenario.writer.wrong(), 0U) << position;
    if (!fired) {
      EXPECT_GT(position, 50U);  // the scenario does something
      break;
    }
  }
}

TEST(AllocatorFaults, EveryKindOfCallIsReached) {
  AllocatorSetup setup(6);
  setup.device->reset();
  Scenario scenario(setup);
  scenario.run();
  EXPECT_EQ(scenario.failures(), 0);
  auto calls = setup.device->calls();
  for (const char* name :
       {"frame_create", "frame_release", "map", "unmap", "address_reserve", "event_create",
        "event_record", "event_synchronize", "event_done", "stream_capturing", "synchronize"}) {
    EXPECT_GT(calls[name], 0U) << name;
  }
}

TEST(AllocatorFaults, GrowingThatFailsHalfWayKeepsWhatIsMappedInTheCache) {
  AllocatorSetup setup(4);
  setup.device->fail_nth_call_of("map", 2);
  EXPECT_THROW(setup.take(4 * kFrame), DeviceError);
  EXPECT_EQ(setup.used_frames(), 2U);
  EXPECT_TRUE(setup.balanced());
  EXPECT_NE(setup.take(4 * kFrame), nullptr);
  EXPECT_EQ(setup.spy->most_frames(), 4);
}

TEST(AllocatorFaults, EventThatCannotBeRecordedAtAFreeIsRecordedLater) {
  AllocatorSetup setup(2);
  const OwnedStream stream(setup.spy);
  std::promise<void> work;
  run_on(stream.get(), [done = work.get_future().share()] { done.wait(); });
  void* block = setup.take(kMiB);
  setup.allocator->record_stream(block, stream.get());
  setup.device->fail_nth_call_of("event_record", 0);
  setup.allocator->free(block);
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
  EXPECT_NE(setup.take(kMiB), block);  // records it
  work.set_value();
  setup.spy->synchronize();
  EXPECT_EQ(setup.take(kMiB), block);
}

TEST(AllocatorFaults, AllocatorThatCannotWaitGoesAllTheSame) {
  AllocatorSetup setup(2);
  setup.take(kFrame);
  setup.device->fail_nth_call_of("synchronize", 0);
  setup.allocator.reset();
  EXPECT_EQ(setup.used_frames(), 0U);
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
}

}  // namespace
}  // namespace penstock
