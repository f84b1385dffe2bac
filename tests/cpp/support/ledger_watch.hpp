// A thread that watches the ledger for as long as it lives: the cap holds at every instant.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <thread>

#include "budget/budget.hpp"

namespace penstock::testing {

class LedgerWatch {
 public:
  explicit LedgerWatch(const Budget& budget) : thread_([this, &budget] { watch(budget); }) {}
  ~LedgerWatch() {
    stop_ = true;
    thread_.join();
    EXPECT_EQ(violations_, 0U);
    EXPECT_GT(readings_, 0U);
  }
  LedgerWatch(const LedgerWatch&) = delete;
  LedgerWatch& operator=(const LedgerWatch&) = delete;

 private:
  void watch(const Budget& budget) {
    do {
      const BudgetStats stats = budget.stats();
      std::size_t sum = 0;
      for (const std::size_t used : stats.used_by_tag) sum += used;
      if (sum != stats.used || stats.used > stats.cap) ++violations_;
      ++readings_;
      std::this_thread::yield();
    } while (!stop_);
  }

  std::atomic<bool> stop_{false};
  std::size_t violations_ = 0;  // read after the thread has ended
  std::size_t readings_ = 0;
  std::thread thread_;
};

}  // namespace penstock::testing
