// A host tier that is a vector of bytes: it can be slow, not ready, or fail, and it checks that it
// is used as a tier must be: one caller at a time, each fetch released once, with the event of its
// copies.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "host_tier/host_tier.hpp"
#include "support/files.hpp"

namespace penstock::testing {

class FakeTier : public HostTier {
 public:
  FakeTier(Bytes bytes, std::size_t page_size)
      : HostTier(bytes.size(), page_size), bytes_(std::move(bytes)) {}
  ~FakeTier() override { EXPECT_TRUE(fetched_.empty()) << "a page was not released"; }

  std::function<void(PageIndex)> on_fetch;   ///< Before each fetch; may wait, or throw.
  std::function<bool(PageIndex)> ask_ready;  ///< Whether a page is ready; all are without it.
  std::function<void()> on_require;          ///< In place of looking whether files were changed.
  bool writable = true;                      ///< Whether it gives its address.
  bool together = false;                     ///< Whether its pages lie together, as in a slab.

  const Bytes& bytes() const { return bytes_; }
  /// Fetches so far, in order.
  std::vector<PageIndex> fetches() const {
    const std::lock_guard lock(mutex_);
    return fetches_;
  }
  /// Whether each copy that was begun is over.
  bool settled(Device& device) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [page, copied] : copied_) {
      if (!device.event_done(copied->get())) return false;
    }
    return fetched_.empty();
  }
  /// Releases without an event: their copies were given up.
  int given_up() const { return given_up_; }

  std::string kind() const override { return "fake"; }
  void write(std::size_t offset, const void* source, std::size_t nbytes) override {
    std::memcpy(bytes_.data() + offset, source, nbytes);
  }
  bool wait_for(std::chrono::milliseconds /*limit*/) override { return true; }
  std::size_t total_bytes() const noexcept override { return bytes_.size(); }
  std::size_t done_bytes() const noexcept override { return bytes_.size(); }
  void expect(std::vector<PageIndex> /*order*/) override {}
  std::size_t pages_together(PageIndex first) const override {
    return together ? (nbytes() + page_size() - 1) / page_size() - first : 1;
  }
  void require_unchanged() override {
    if (on_require) on_require();
  }
  bool ready(PageIndex page) override { return !ask_ready || ask_ready(page); }

  const std::vector<Piece>& fetch(PageIndex page) override {
    EXPECT_FALSE(busy_.exchange(true) && !together) << "two callers at once";
    try {
      if (on_fetch) on_fetch(page);
    } catch (...) {
      busy_ = false;
      throw;
    }
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(fetched_.count(page), 0U) << "page " << page << " was not released";
    fetches_.push_back(page);
    // Two pieces of odd sizes, as at the border of two files.
    const std::size_t start = page * page_size();
    const std::size_t nbytes = std::min(page_size(), bytes_.size() - start);
    const std::size_t first = together ? nbytes : std::min(nbytes, std::size_t{1001});
    const auto* source = reinterpret_cast<const std::byte*>(bytes_.data() + start);
    auto& pieces = fetched_[page];
    pieces.push_back({source, 0, first});
    if (nbytes > first) pieces.push_back({source + first, first, nbytes - first});
    return pieces;
  }

  void release(PageIndex page, std::shared_ptr<OwnedEvent> copied) override {
    const std::lock_guard lock(mutex_);
    EXPECT_EQ(fetched_.erase(page), 1U) << "page " << page << " was not fetched";
    if (copied) {
      copied_[page] = std::move(copied);
    } else {
      ++given_up_;
    }
    busy_ = false;
  }

  void read(std::size_t offset, void* target, std::size_t nbytes) override {
    std::memcpy(target, bytes_.data() + offset, nbytes);
  }
  std::byte* address() noexcept override {
    return writable ? reinterpret_cast<std::byte*>(bytes_.data()) : nullptr;
  }
  HostTierStats stats() const override { return {bytes_.size(), 0, 0}; }

 private:
  Bytes bytes_;
  std::atomic<bool> busy_{false};  // from fetch to release
  std::atomic<int> given_up_{0};
  mutable std::mutex mutex_;
  std::vector<PageIndex> fetches_;
  std::map<PageIndex, std::vector<Piece>> fetched_;
  std::map<PageIndex, std::shared_ptr<OwnedEvent>> copied_;  // the latest of each page
};

}  // namespace penstock::testing
