// Random models under random conditions: whatever the steps, the ring, the delays and the moments
// at which regions are arranged anew or evicted, every read finds the right bytes, the cap holds at
// every instant, and all is given back.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "schedule/page_lists.hpp"
#include "streamer/streamer.hpp"
#include "support/frames_setup.hpp"
#include "support/ledger_watch.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;

class Life {
 public:
  explicit Life(unsigned seed)
      : random_(seed),
        page_count_(between(2, 24)),
        cap_(between(6, 16)),
        setup_(cap_, page_count_, between(0, 5000)),
        look_(setup_.bytes) {
    for (std::size_t i = between(1, 3); i > 0; --i) {
      streams_.emplace_back(setup_);
    }
    for (const char* name : {"event_record", "event_wait", "copy", "map"}) {
      if (one_in(2)) setup_.device->delay_calls_of(name, microseconds(between(1, 30)));
    }
    if (one_in(2)) {
      setup_.spy->on_copy = [](std::uintptr_t target, std::size_t, StreamHandle stream) {
        const auto pause = microseconds((target / kPage) % 5 * 60);
        run_on(stream, [pause] { std::this_thread::sleep_for(pause); });
      };
    }
    if (one_in(4)) setup_.tier->ask_ready = [](PageIndex page) { return page % 3 != 0; };
    for (std::size_t i = between(1, 14); i > 0; --i) {
      Pages pages;
      for (std::size_t n = between(0, 5); n > 0; --n) push_unique(pages, any_page());
      steps_.push_back(pages);
    }
  }

  void run() {
    const LedgerWatch watch(*setup_.budget);
    {
      Streamer streamer(setup_.region);
      for (StepId id = 0; id < steps_.size(); ++id) streamer.define(id, steps_[id]);
      follow(streamer);
      setup_.region->set_verify(one_in(5));
      streamer.set_trace(one_in(3));
      for (int pass = 0; pass < 6; ++pass) {
        if (one_in(2)) arrange();
        if (one_in(5)) setup_.region->evict(pages_between(0, any_page()));
        if (one_in(5)) follow(streamer);
        if (one_in(3)) streamer.prefetch();
        run_pass(streamer);
        static_cast<void>(streamer.passes());
      }
    }
    if (one_in(2)) setup_.region.reset();  // with work under way
    for (const auto& stream : streams_) setup_.spy->stream_synchronize(stream.get());
    setup_.region.reset();
    EXPECT_EQ(look_.wrong(), 0);
    EXPECT_EQ(setup_.budget->stats().used, 0U);
    EXPECT_EQ(setup_.spy->frames(), 0);
    EXPECT_LE(setup_.spy->most_frames(), static_cast<int>(cap_));
    EXPECT_TRUE(setup_.tier->settled(*setup_.spy));
    EXPECT_EQ(setup_.device->suppressed_count(), 0U) << setup_.device->last_suppressed();
  }
  int looks() const { return look_.looks(); }

 private:
  std::size_t between(std::size_t least, std::size_t most) {
    return std::uniform_int_distribution<std::size_t>(least, most)(random_);
  }
  bool one_in(std::size_t n) { return between(1, n) == 1; }
  PageIndex any_page() { return static_cast<PageIndex>(between(0, page_count_ - 1)); }
  StreamHandle any_stream() {
    return one_in(6) ? kCaller : streams_[between(0, streams_.size() - 1)].get();
  }

  void arrange() {
    Arrangement wanted;
    wanted.ring = between(1, 6);
    std::size_t own = between(0, cap_);
    for (PageIndex page = 0; page < page_count_; ++page) {
      if (own > 0 && one_in(2)) {
        --own;
        wanted.slot.push_back(Arrangement::kOwnFrame);
      } else {
        const std::size_t slot = one_in(4) ? between(0, wanted.ring - 1) : page % wanted.ring;
        wanted.slot.push_back(static_cast<std::uint32_t>(slot));
      }
    }
    try {
      setup_.region->arrange(wanted);
    } catch (const CapExceededError&) {
    }
  }

  void follow(Streamer& streamer) {
    order_.clear();
    std::vector<Pages> pages;
    for (std::size_t i = between(0, 14); i > 0; --i) {
      order_.push_back(static_cast<StepId>(between(0, steps_.size() - 1)));
      pages.push_back(steps_[order_.back()]);
    }
    streamer.follow(order_, pages);
  }

  void run_pass(Streamer& streamer) {
    const StreamHandle main = any_stream();
    streamer.begin_pass(main);
    std::vector<StepId> steps = order_;
    if (one_in(3)) std::shuffle(steps.begin(), steps.end(), random_);
    if (one_in(3)) steps.resize(between(0, steps.size()));
    const bool one_stream = one_in(2);
    for (const StepId id : steps) {
      if (one_in(12)) continue;
      const auto other = static_cast<StepId>(between(0, steps_.size() - 1));
      const StreamHandle stream = one_stream ? main : any_stream();
      run_step(streamer, id, stream, one_in(8) ? &other : nullptr);
      if (one_in(10)) run_step(streamer, one_in(2) ? id : other, stream, nullptr);
    }
    streamer.end_pass(main);
  }

  // A step, and perhaps another one inside.
  void run_step(Streamer& streamer, StepId id, StreamHandle stream, const StepId* inside) {
    try {
      streamer.begin(id, stream);
    } catch (const CapExceededError&) {
      return;  // what runs around it holds too much
    }
    look_.look(*setup_.region, steps_[id], stream, microseconds(between(0, 3) * 60));
    if (inside != nullptr) {
      run_step(streamer, *inside, stream, nullptr);
      look_.look(*setup_.region, steps_[id], stream);
    }
    streamer.end(id, stream);
  }

  std::mt19937 random_;
  std::size_t page_count_;
  std::size_t cap_;
  FramesSetup setup_;
  LateLook look_;
  std::vector<ReaderStream> streams_;
  std::vector<Pages> steps_;
  std::vector<StepId> order_;
};

class StreamerProperty : public ::testing::TestWithParam<unsigned> {};

TEST_P(StreamerProperty, EveryReadIsRightUnderTheCapAndAllIsGivenBack) {
  int looks = 0;
  for (unsigned seed = GetParam() * 12; seed < (GetParam() + 1) * 12; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Life life(seed);
    life.run();
    looks += life.looks();
    if (HasFailure()) return;
  }
  EXPECT_GT(looks, 300);
}

INSTANTIATE_TEST_SUITE_P(Seeds, StreamerProperty, ::testing::Range(0U, 5U));

}  // namespace
}  // namespace penstock
