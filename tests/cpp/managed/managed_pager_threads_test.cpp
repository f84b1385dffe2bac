// Many threads, slow calls and regions that come and go: the bytes that a step reads are always the
// right ones, the cap holds at every instant, and nothing is used after it is gone.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "error/error.hpp"
#include "support/ledger_watch.hpp"
#include "support/pager_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;

void slow_down(FaultyDevice& device) {
  for (const char* name : {"managed_prefetch", "managed_evict", "event_wait"}) {
    device.delay_calls_of(name, microseconds(100));
  }
}

struct Model {
  std::shared_ptr<ManagedRegion> region;
  Bytes bytes;
};

// One thread's share: random steps, each reading what it began through a stream of its own.
void use_models(PagerSetup& setup, const std::vector<Model>& models, unsigned seed, int steps) {
  std::mt19937 random(seed);
  const auto below = [&](std::size_t n) {
    return static_cast<PageIndex>(std::uniform_int_distribution<std::size_t>(0, n - 1)(random));
  };
  const OwnedStream stream(setup.device);
  Bytes copied(kPage);
  for (int i = 0; i < steps; ++i) {
    const Model& model = models[below(models.size())];
    ManagedPager& pager = *setup.pager;
    ManagedRegion& region = *model.region;
    const PageIndex page = below(region.page_count());
    switch (below(9)) {
      case 8:
        if (below(3) > 0) {
          region.keep({page, below(region.page_count())});
        } else {
          region.keep({});
        }
        break;
      case 0:
        pager.evict(region, {page, below(region.page_count())});
        break;
      case 1:
        pager.prefetch_ahead(region, {page, below(region.page_count())});
        break;
      case 2:
        pager.advance(region, below(region.page_count()));
        break;
      case 3:
        pager.set_active(region, below(2) == 0);
        break;
      default: {
        pager.begin(region, {page}, stream.get());
        setup.device->copy(copied.data(), region.address() + page * kPage, kPage, stream.get());
        pager.end(region, {page}, stream.get());
        setup.device->stream_synchronize(stream.get());
        ASSERT_EQ(std::memcmp(copied.data(), model.bytes.data() + page * kPage, kPage), 0);
      }
    }
  }
}

TEST(ManagedPagerThreads, FourThreadsOnThreeModelsReadTheRightBytesUnderTheCap) {
  PagerSetup setup(5);  // one page for each thread, and one to fight for
  slow_down(*setup.device);
  std::vector<Model> models;
  for (std::size_t i = 0; i < 3; ++i) {
    auto region = setup.reserve(4 + i, i == 1 ? Access::kReadWrite : Access::kReadMostly);
    const Bytes bytes = fill(*region, i);
    std::vector<Pages> schedule;
    for (PageIndex page = 0; page < region->page_count(); ++page) schedule.push_back({page});
    setup.pager->set_schedule(*region, schedule);
    models.push_back({region, bytes});
  }
  {
    const LedgerWatch watch(*setup.budget);
    std::vector<std::unique_ptr<Running>> threads;
    for (unsigned seed = 0; seed < 4; ++seed) {
      threads.push_back(
          std::make_unique<Running>([&, seed] { use_models(setup, models, seed, 200); }));
    }
    for (const auto& thread : threads) EXPECT_NO_THROW(thread->join());
  }
  setup.pager->synchronize();
  EXPECT_LE(setup.spy->peak(), 5 * kPage);
  EXPECT_EQ(setup.spy->held(), setup.budget->stats().used);
  EXPECT_EQ(setup.device->suppressed_count(), 0U);
  models.clear();
  EXPECT_EQ(setup.budget->stats().used, 0U);
}

TEST(ManagedPagerThreads, WritesOfManyThreadsOutliveTheEvictions) {
  PagerSetup setup(3);
  slow_down(*setup.device);
  const auto region = setup.reserve(6, Access::kReadWrite);
  constexpr unsigned kThreads = 3;
  constexpr int kRounds = 60;
  std::vector<std::unique_ptr<Running>> threads;
  for (unsigned id = 0; id < kThreads; ++id) {
    threads.push_back(std::make_unique<Running>([&, id] {
      std::mt19937 random(id);
      for (int i = 0; i < kRounds; ++i) {
        for (PageIndex page = 0; page < region->page_count(); ++page) {
          setup.pager->begin(*region, {page}, kCaller);
          ++reinterpret_cast<std::uint32_t*>(region->address() + page * kPage)[id];
          setup.pager->end(*region, {page}, kCaller);
          if (random() % 4 == 0) setup.pager->evict(*region, {page});
        }
      }
    }));
  }
  for (const auto& thread : threads) EXPECT_NO_THROW(thread->join());
  for (PageIndex page = 0; page < region->page_count(); ++page) {
    for (unsigned id = 0; id < kThreads; ++id) {
      EXPECT_EQ(reinterpret_cast<std::uint32_t*>(region->address() + page * kPage)[id], kRounds);
    }
  }
}

TEST(ManagedPagerThreads, ModelsThatGoWhileOthersTakeTheirPagesLeaveTheLedgerExact) {
  PagerSetup setup(4);
  slow_down(*setup.device);
  std::atomic<bool> stop{false};
  {
    const LedgerWatch watch(*setup.budget);
    Running coming_and_going([&] {
      while (!stop) {
        const auto region = setup.reserve(3);
        setup.pager->prefetch_ahead(*region, {0, 1, 2});
        setup.pager->prefetch_ahead(*region, {2});
      }
    });
    const auto steady = setup.reserve(6);
    const Bytes bytes = fill(*steady, 7);
    PageIndex done = 0;
    try {
      for (; done < 300; ++done) run_step(*setup.pager, *steady, {done % 6, (done + 1) % 6});
    } catch (const Error& error) {
      // Also not CapExceededError: the pages of a region that is going are as good as free.
      ADD_FAILURE() << "step " << done << ": " << error.what();
    }
    EXPECT_TRUE(holds(*steady, bytes));
    stop = true;
    coming_and_going.join();
  }
  EXPECT_EQ(setup.budget->stats().used, 0U);
  EXPECT_LE(setup.spy->peak(), 4 * kPage);
}

TEST(ManagedPagerThreads, RegionThatGoesWhileItsPagesAreEvictedForAnother) {
  PagerSetup setup(4);
  auto idle = setup.reserve(4);
  const auto wanting = setup.reserve(4);
  run_step(*setup.pager, *idle, pages_between(0, 4));
  Gate evicting;
  Gate go_on;
  setup.spy->on_evict = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    evicting.open();
    run_on(stream, [&] { go_on.wait(); });
  };
  Running begin([&] { setup.pager->begin(*wanting, {0, 1}, kCaller); });
  evicting.wait();
  Running end_of_idle([&] { idle.reset(); });
  // It must wait for the eviction; were it to go on at once, it would show within this time.
  EXPECT_FALSE(eventually([&] { return end_of_idle.ended(); }, std::chrono::milliseconds(100)));
  go_on.open();
  EXPECT_NO_THROW(end_of_idle.join());
  EXPECT_NO_THROW(begin.join());
  EXPECT_EQ(setup.used_pages(), 2U);
  setup.pager->end(*wanting, {0, 1}, kCaller);
}

TEST(ManagedPagerThreads, RegionThatIsGoingIsAsGoodAsFree) {
  PagerSetup setup(4);
  auto going = setup.reserve(4);
  const auto wanting = setup.reserve(4);
  run_step(*setup.pager, *going, pages_between(0, 4));
  Gate releasing;
  Gate go_on;
  setup.spy->on_release = [&](std::uintptr_t address, std::size_t, StreamHandle) {
    if (reinterpret_cast<std::byte*>(address) == wanting->address()) return;
    releasing.open();
    go_on.wait();
  };
  Running end_of_going([&] { going.reset(); });
  releasing.wait();
  Running begin([&] { setup.pager->begin(*wanting, {0, 1}, kCaller); });
  // Were it refused, it would show within this time.
  EXPECT_FALSE(eventually([&] { return begin.ended(); }, std::chrono::milliseconds(100)));
  go_on.open();
  end_of_going.join();
  ASSERT_NO_THROW(begin.join());
  setup.pager->end(*wanting, {0, 1}, kCaller);
}

TEST(ManagedPagerThreads, EveryoneGetsAnAnswerWhenThePagerGoesWithRequestsQueued) {
  const auto device = std::make_shared<FaultyDevice>(std::make_shared<HostDevice>());
  const auto budget = std::make_shared<Budget>(4 * kPage);
  device->delay_calls_of("managed_prefetch", microseconds(500));
  {
    auto pager = ManagedPager::create(device, budget, kPage);
    const auto region = pager->reserve(8 * kPage, Access::kReadMostly);
    for (PageIndex i = 0; i < 100; ++i) pager->prefetch_ahead(*region, {i % 8});
    pager.reset();  // the region keeps the pager until it goes itself
  }
  EXPECT_EQ(budget->stats().used, 0U);
  auto calls = device->calls();
  EXPECT_EQ(calls["stream_create"], calls["stream_destroy"]);
  EXPECT_EQ(calls["event_create"], calls["event_destroy"]);
  EXPECT_EQ(calls["managed_reserve"], calls["managed_release"]);
}

}  // namespace
}  // namespace penstock
