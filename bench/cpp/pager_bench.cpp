// Reserve, prefetch, evict, and the two calls around a step whose pages are resident.
#include <benchmark/benchmark.h>

#include <cstring>
#include <vector>

#include "device.hpp"
#include "managed/managed_pager.hpp"

namespace penstock {
namespace {

constexpr std::size_t kPage = std::size_t{2} << 20;

// A filled region that fits under the cap, and the pager under it.
struct Setup {
  explicit Setup(std::size_t nbytes)
      : device(bench_device()),
        budget(std::make_shared<Budget>(nbytes)),
        pager(ManagedPager::create(device, budget, kPage)),
        region(pager->reserve(nbytes, Access::kReadMostly)),
        pages(region->pages_of(0, nbytes)) {
    const std::vector<char> bytes(kPage, 'p');
    for (std::size_t at = 0; at < nbytes; at += kPage) {
      device->managed_write(region->address() + at, bytes.data(), kPage);
    }
  }
  void prefetch() {
    pager->prefetch(*region, pages, {});
    pager->synchronize();
  }
  std::shared_ptr<Device> device;
  std::shared_ptr<Budget> budget;
  std::shared_ptr<ManagedPager> pager;
  std::shared_ptr<ManagedRegion> region;
  std::vector<PageIndex> pages;
};

void label(benchmark::State& state, const Device& device) {
  state.SetLabel(device.info().name);
}

void reserve(benchmark::State& state) {
  const auto device = bench_device();
  const auto budget = std::make_shared<Budget>(kPage);
  const auto pager = ManagedPager::create(device, budget, kPage);
  const auto nbytes = static_cast<std::size_t>(state.range(0));
  for (auto _ : state) {
    benchmark::DoNotOptimize(pager->reserve(nbytes, Access::kReadMostly)->address());
  }
  label(state, *device);
  if (budget->stats().used != 0) state.SkipWithError("reserving charged the budget");
}
BENCHMARK(reserve)->Arg(64 << 20)->Unit(benchmark::kMicrosecond)->UseRealTime();

void prefetch(benchmark::State& state) {
  const auto nbytes = static_cast<std::size_t>(state.range(0));
  Setup setup(nbytes);
  setup.prefetch();  // the first one also maps the host's pages
  setup.pager->evict(*setup.region, setup.pages);
  for (auto _ : state) {
    setup.prefetch();
    if (setup.budget->stats().used != nbytes) state.SkipWithError("not all is charged");
    state.PauseTiming();
    setup.pager->evict(*setup.region, setup.pages);
    state.ResumeTiming();
  }
  state.SetBytesProcessed(state.iterations() * state.range(0));
  label(state, *setup.device);
}
BENCHMARK(prefetch)->RangeMultiplier(8)->Range(2 << 20, 1 << 30)->UseRealTime();

void evict_clean(benchmark::State& state) {
  const auto nbytes = static_cast<std::size_t>(state.range(0));
  Setup setup(nbytes);
  for (auto _ : state) {
    state.PauseTiming();
    setup.prefetch();
    state.ResumeTiming();
    if (setup.pager->evict(*setup.region, setup.pages) != nbytes) {
      state.SkipWithError("not all was given back");
    }
  }
  if (setup.budget->stats().used != 0) state.SkipWithError("the ledger is not empty");
  state.SetBytesProcessed(state.iterations() * state.range(0));
  label(state, *setup.device);
}
BENCHMARK(evict_clean)->RangeMultiplier(8)->Range(2 << 20, 1 << 30)->UseRealTime();

void begin_and_end_of_resident_pages(benchmark::State& state) {
  const auto count = static_cast<std::size_t>(state.range(0));
  Setup setup(count * kPage);
  setup.prefetch();
  for (auto _ : state) {
    setup.pager->begin(*setup.region, setup.pages, {});
    setup.pager->end(*setup.region, setup.pages, {});
  }
  if (setup.pager->region_stats(*setup.region).pinned_pages != 0) {
    state.SkipWithError("pages are still pinned");
  }
  label(state, *setup.device);
}
BENCHMARK(begin_and_end_of_resident_pages)->Arg(1)->Arg(16)->Arg(64)->UseRealTime();

}  // namespace
}  // namespace penstock
