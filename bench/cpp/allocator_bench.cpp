// What a request and its release cost, for the sequences of sizes that models make. Time is that of
// one pair; the device is the host's, so it is bookkeeping alone where no frame is made.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "allocator/caching_allocator.hpp"
#include "device/handles.hpp"
#include "device/host/host_device.hpp"

namespace penstock {
namespace {

constexpr std::size_t kKiB = std::size_t{1} << 10;
constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kFrame = std::size_t{2} << 20;

struct Setup {
  std::shared_ptr<HostDevice> device = std::make_shared<HostDevice>();
  std::shared_ptr<Budget> budget = std::make_shared<Budget>(1024 * kFrame);
  std::shared_ptr<FramePool> pool = FramePool::create(device, budget, kFrame);
  std::shared_ptr<CachingAllocator> allocator = CachingAllocator::create(pool);
};

/// One operation of a trace: asks for `nbytes` as block `slot`, or frees that block if it is zero.
struct Operation {
  std::size_t nbytes;
  std::size_t slot;
};
using Trace = std::vector<Operation>;

/// Appends a request for a size that is freed after `life` further requests.
class TraceWriter {
 public:
  void ask(std::size_t nbytes, std::size_t life) {
    while (!due_.empty() && due_.front().first <= now_) free_first();
    std::size_t slot = slots_;
    if (unused_.empty()) {
      ++slots_;
    } else {
      slot = unused_.back();
      unused_.pop_back();
    }
    trace_.push_back({nbytes, slot});
    const auto when = now_++ + life;
    auto at = due_.end();
    while (at != due_.begin() && std::prev(at)->first > when) --at;
    due_.insert(at, {when, slot});
  }
  Trace finish() {
    while (!due_.empty()) free_first();
    return std::move(trace_);
  }

 private:
  void free_first() {
    trace_.push_back({0, due_.front().second});
    unused_.push_back(due_.front().second);
    due_.pop_front();
  }

  Trace trace_;
  std::deque<std::pair<std::size_t, std::size_t>> due_;
  std::vector<std::size_t> unused_;
  std::size_t slots_ = 0;
  std::size_t now_ = 0;
};

// A Llama of 16 layers, hidden size 4096, for `tokens` tokens: the temporaries of one pass.
Trace llama_pass(std::size_t tokens) {
  TraceWriter trace;
  const std::size_t hidden = tokens * 4096 * 2;
  const std::size_t inner = tokens * 14336 * 2;
  for (int layer = 0; layer < 16; ++layer) {
    for (int norm = 0; norm < 2; ++norm) {
      trace.ask(2 * hidden, 2);  // in float32
      trace.ask(2 * hidden, 1);
      trace.ask(tokens * 4, 1);
      trace.ask(hidden, 4);
    }
    trace.ask(hidden, 4);                 // q
    trace.ask(hidden / 4, 4);             // k
    trace.ask(hidden / 4, 3);             // v
    trace.ask(hidden, 3);                 // rotated
    trace.ask(tokens * 32 * 128 * 2, 2);  // attention
    trace.ask(hidden, 5);                 // out
    trace.ask(inner, 3);                  // gate
    trace.ask(inner, 2);                  // up
    trace.ask(inner, 1);
    trace.ask(hidden, 6);
  }
  trace.ask(tokens * 128256 * 2, 1);
  return trace.finish();
}

Trace mixed_sizes() {
  TraceWriter trace;
  std::mt19937 random(1);
  for (int i = 0; i < 4000; ++i) {
    const auto any = random();
    const std::size_t nbytes =
        any % 4 == 0 ? kMiB + random() % (8 * kMiB) : 1 + random() % (64 * kKiB);
    trace.ask(nbytes, 1 + random() % 60);
  }
  return trace.finish();
}

std::size_t requests(const Trace& trace) {
  std::size_t count = 0;
  for (const Operation& operation : trace) count += operation.nbytes > 0 ? 1 : 0;
  return count;
}

void replay(CachingAllocator& allocator, const Trace& trace, StreamHandle stream,
            std::vector<void*>& blocks) {
  for (const Operation& operation : trace) {
    if (operation.slot >= blocks.size()) blocks.resize(operation.slot + 1);
    if (operation.nbytes > 0) {
      blocks[operation.slot] = allocator.allocate(operation.nbytes, stream);
    } else {
      allocator.free(blocks[operation.slot]);
    }
  }
}

void report(benchmark::State& state, const Trace& trace) {
  state.counters["ns_per_pair"] = benchmark::Counter(
      static_cast<double>(state.iterations()) * static_cast<double>(requests(trace)) * 1e-9,
      benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

void run(benchmark::State& state, const Trace& trace) {
  Setup setup;
  std::vector<void*> blocks;
  replay(*setup.allocator, trace, {}, blocks);  // warm: the frames are made here
  const std::uint64_t made = setup.allocator->stats().num_device_alloc;
  for (auto _ : state) replay(*setup.allocator, trace, {}, blocks);
  const AllocatorStats stats = setup.allocator->stats();
  const SideStats& all = stats.side(Side::kAll);
  state.counters["reserved_to_live"] =
      static_cast<double>(all.reserved_bytes.peak) / static_cast<double>(all.allocated_bytes.peak);
  if (stats.num_device_alloc > made + 3) state.SkipWithError("a warm trace goes on making frames");
  if (stats.side(Side::kAll).allocation.current != 0) state.SkipWithError("blocks were left");
  report(state, trace);
}

void one_size(benchmark::State& state) {
  Setup setup;
  const auto nbytes = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) {
    void* block = setup.allocator->allocate(nbytes, {});
    benchmark::DoNotOptimize(block);
    setup.allocator->free(block);
  }
}
BENCHMARK(one_size)->Arg(4096)->Arg(8 << 20);

void llama_decode(benchmark::State& state) {
  run(state, llama_pass(1));
}
BENCHMARK(llama_decode);

void llama_prefill(benchmark::State& state) {
  run(state, llama_pass(512));
}
BENCHMARK(llama_prefill);

void mixed(benchmark::State& state) {
  run(state, mixed_sizes());
}
BENCHMARK(mixed);

// All threads at one allocator, spread over four streams.
void threads(benchmark::State& state) {
  static std::unique_ptr<Setup> setup;
  static std::vector<std::unique_ptr<OwnedStream>> streams;
  if (state.thread_index() == 0) {
    setup = std::make_unique<Setup>();
    for (int i = 0; i < 4; ++i) streams.push_back(std::make_unique<OwnedStream>(setup->device));
  }
  const Trace trace = llama_pass(1);
  std::vector<void*> blocks;
  for (auto _ : state) {
    const auto stream = static_cast<std::size_t>(state.thread_index()) % 4;
    replay(*setup->allocator, trace, streams[stream]->get(), blocks);
  }
  report(state, trace);
  if (state.thread_index() == 0) {
    if (setup->allocator->stats().side(Side::kAll).allocation.current != 0) {
      state.SkipWithError("blocks were left");
    }
    setup->allocator.reset();
    streams.clear();
    setup.reset();
  }
}
BENCHMARK(threads)->Threads(1)->Threads(8)->UseRealTime();

// Blocks that another stream uses too: an event for each.
void recorded(benchmark::State& state) {
  Setup setup;
  const OwnedStream other(setup.device);
  for (auto _ : state) {
    void* block = setup.allocator->allocate(kMiB, {});
    setup.allocator->record_stream(block, other.get());
    setup.allocator->free(block);
  }
}
BENCHMARK(recorded);

}  // namespace
}  // namespace penstock
