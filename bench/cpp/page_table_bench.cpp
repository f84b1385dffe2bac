// What the page table costs for a model of 14 GB in pages of 2 MiB, with a schedule of 300 steps.
#include <benchmark/benchmark.h>

#include "managed/page_table.hpp"

namespace penstock {
namespace {

constexpr std::size_t kPages = 7000;
constexpr std::size_t kSteps = 300;

std::vector<std::vector<PageIndex>> schedule() {
  std::vector<std::vector<PageIndex>> steps(kSteps);
  for (std::size_t page = 0; page < kPages; ++page) {
    steps[page * kSteps / kPages].push_back(static_cast<PageIndex>(page));
  }
  return steps;
}

PageTable resident_table() {
  PageTable table(kPages);
  table.set_schedule(schedule());
  for (PageIndex page = 0; page < kPages; ++page) {
    table.begin_load(page);
    table.finish_load(page);
  }
  return table;
}

void load_and_evict_a_page(benchmark::State& state) {
  PageTable table(kPages);
  table.set_schedule(schedule());
  PageIndex page = 0;
  for (auto _ : state) {
    table.begin_load(page);
    table.finish_load(page);
    table.begin_evict(page);
    table.finish_evict(page);
    page = (page + 1) % kPages;
  }
  if (table.count(PageState::kAbsent) != kPages) state.SkipWithError("a page was left behind");
}
BENCHMARK(load_and_evict_a_page);

void choose_64_victims(benchmark::State& state) {
  const PageTable table = resident_table();
  std::size_t chosen = 0;
  for (auto _ : state) chosen += table.victims(64).size();
  if (chosen != 64 * static_cast<std::size_t>(state.iterations())) {
    state.SkipWithError("too few victims");
  }
}
BENCHMARK(choose_64_victims);

void advance_through_a_pass(benchmark::State& state) {
  PageTable table = resident_table();
  for (auto _ : state) {
    for (StepIndex step = 0; step < kSteps; ++step) table.advance(step);
  }
  if (table.now() != kSteps * static_cast<StepTime>(state.iterations())) {
    state.SkipWithError("lost count of the steps");
  }
}
BENCHMARK(advance_through_a_pass)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace penstock
