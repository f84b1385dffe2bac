// What charging costs, alone and with threads at the same ledger.
#include <benchmark/benchmark.h>

#include "budget/budget.hpp"

namespace penstock {
namespace {

constexpr std::size_t kBytes = 4096;
Budget shared_budget(std::size_t{64} * kBytes);  // one for all threads of a benchmark

void charge_and_release(benchmark::State& state) {
  for (auto _ : state) {
    if (shared_budget.try_charge(Tag::kWeights, kBytes)) {
      shared_budget.release(Tag::kWeights, kBytes);
    } else {
      state.SkipWithError("refused with room left");
    }
  }
  if (state.thread_index() == 0 && shared_budget.stats().peak > shared_budget.cap()) {
    state.SkipWithError("the cap was crossed");
  }
}
BENCHMARK(charge_and_release)->Threads(1)->Threads(8)->UseRealTime();

void refused_charge(benchmark::State& state) {
  Budget budget(kBytes);
  for (auto _ : state) benchmark::DoNotOptimize(budget.try_charge(Tag::kWeights, 2 * kBytes));
  if (budget.stats().used != 0) state.SkipWithError("a refused charge left something behind");
}
BENCHMARK(refused_charge);

}  // namespace
}  // namespace penstock
