// Whatever fails, and wherever: the caller gets a typed error, no failure vanishes, the ledger is
// balanced once the regions are gone, and the same pager works again.
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "error/error.hpp"
#include "io/fill_job.hpp"
#include "support/pager_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::milliseconds;

constexpr std::size_t kCapPages = 4;

// All that a user does with a pager, under a cap that makes it evict, with bytes checked.
void cycle(PagerSetup& setup, Access access, StreamHandle stream) {
  ManagedPager& pager = *setup.pager;
  const TemporaryDirectory directory;
  const Bytes bytes = pattern(6 * kPage, 1);
  const std::string file = directory.write("weights", bytes);

  const auto idle = setup.reserve(2, access);
  run_step(pager, *idle, {0, 1});
  const auto region = setup.reserve(6, access);
  FillJob job(region, {file}, {{0, 0, 0, bytes.size()}}, 2);
  if (!job.wait_for(kLongest)) throw std::runtime_error("the fill job did not end");
  pager.set_schedule(*region, {{0, 1}, {2, 3}, {4, 5}});
  for (StepIndex step = 0; step < 3; ++step) {
    const Pages pages = {2 * step, 2 * step + 1};
    pager.advance(*region, step);
    pager.begin(*region, pages, stream);
    pager.prefetch_ahead(*region, {(2 * step + 2) % 6});
    setup.device->stream_synchronize(stream);
    const bool right = std::memcmp(region->address() + 2 * step * kPage,
                                   bytes.data() + 2 * step * kPage, 2 * kPage) == 0;
    pager.end(*region, pages, stream);
    if (!right) throw std::runtime_error("wrong bytes");
  }
  pager.prefetch(*region, {0, 2, 5}, stream);
  pager.evict(*region, pages_between(0, 6));
  pager.synchronize();

  // A plan: pages pass through, and room is made ahead.
  region->keep({0, 3});
  pager.set_schedule(*region, {{0}, {1}, {2}, {3}, {4}, {5}});
  for (StepIndex step = 0; step < 12; ++step) {
    const PageIndex page = step % 6;
    pager.advance(*region, page);
    pager.begin(*region, {page}, stream);
    pager.prefetch_ahead(*region, {(page + 1) % 6});
    pager.end(*region, {page}, stream);
    setup.device->stream_synchronize(stream);
  }
  pager.synchronize();
  if (!holds(*region, bytes)) throw std::runtime_error("wrong bytes");
}

class EveryCallFails : public ::testing::TestWithParam<std::tuple<Access, bool>> {};

TEST_P(EveryCallFails, LedgerIsBalancedAndTheNextCycleWorks) {
  const auto [access, own_stream] = GetParam();
  std::uint64_t position = 0;
  for (bool fired = true; fired; ++position) {
    SCOPED_TRACE("call " + std::to_string(position) + " fails");
    PagerSetup setup(kCapPages);
    std::optional<OwnedStream> stream;
    if (own_stream) stream.emplace(setup.spy);
    const StreamHandle reader = own_stream ? stream->get() : kCaller;

    setup.device->fail_nth_call(position);
    bool told = false;
    try {
      cycle(setup, access, reader);
    } catch (const DeviceError& error) {
      told = true;
      EXPECT_NE(std::string(error.what()).find("injected fault"), std::string::npos);
    }
    EXPECT_EQ(setup.budget->stats().used, 0U);
    EXPECT_LE(setup.spy->peak(), kCapPages * kPage);
    fired = setup.device->fired();
    if (fired) {
      told = told || setup.device->suppressed_count() + setup.pager->stats().ahead_failed > 0;
      EXPECT_TRUE(told) << "a failure vanished";
    }
    setup.device->reset();
    EXPECT_NO_THROW(cycle(setup, access, reader));
    EXPECT_EQ(setup.budget->stats().used, 0U);
    EXPECT_EQ(setup.spy->held(), 0U);
    if (HasFailure()) return;
  }
  EXPECT_GT(position, 150U);  // the cycle is made of device calls
}

INSTANTIATE_TEST_SUITE_P(Regions, EveryCallFails,
                         ::testing::Combine(::testing::Values(Access::kReadMostly,
                                                              Access::kReadWrite),
                                            ::testing::Bool()),
                         [](const auto& tested) {
                           const bool own_stream = std::get<1>(tested.param);
                           return std::string(std::get<0>(tested.param) == Access::kReadMostly
                                                  ? "ReadMostly"
                                                  : "ReadWrite") +
                                  (own_stream ? "OwnStream" : "CallersThread");
                         });

TEST(ManagedPagerFaults, PagerThatCannotBeMadeLeavesNothing) {
  const auto device = std::make_shared<FaultyDevice>(std::make_shared<HostDevice>());
  for (const int position : {0, 1}) {
    device->reset();
    device->fail_nth_call_of("stream_create", static_cast<std::uint64_t>(position));
    EXPECT_THROW(ManagedPager::create(device, std::make_shared<Budget>(kPage), kPage), DeviceError);
    auto calls = device->calls();
    EXPECT_EQ(calls["stream_destroy"], static_cast<std::uint64_t>(position));
  }
}

// ---- loads that fail on their stream, after the call -----------------------------------------

TEST(ManagedPagerFaults, BeginTellsOfALoadThatFailedLateAndTheNextOneWorks) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  const Bytes bytes = fill(*region, 1);
  setup.spy->fail_late(1);
  EXPECT_THROW(setup.pager->begin(*region, {0, 1}, kCaller), DeviceError);
  EXPECT_EQ(setup.used_pages(), 0U);
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {0, 1}));
  EXPECT_TRUE(holds(*region, bytes));
}

TEST(ManagedPagerFaults, PrefetchTellsOfALoadThatFailedLateAndTheNextOneWorks) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  setup.spy->fail_late(1);
  EXPECT_THROW(setup.pager->prefetch(*region, {0, 1}, kCaller), DeviceError);
  EXPECT_EQ(setup.pager->prefetch(*region, {0, 1}, kCaller), 2 * kPage);
}

TEST(ManagedPagerFaults, BeginTellsOfAPrefetchAheadThatFailedLate) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  setup.spy->fail_late(1);
  setup.pager->prefetch_ahead(*region, {0, 1});
  setup.pager->synchronize();
  EXPECT_THROW(setup.pager->begin(*region, {0, 1}, kCaller), DeviceError);
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {0, 1}));
}

TEST(ManagedPagerFaults, PagesOfAFailedLoadCanGoAlsoAfterAStreamWaitedForThem) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  const OwnedStream stream(setup.spy);
  setup.spy->fail_late(1);
  setup.pager->begin(*region, {0, 1}, stream.get());
  setup.pager->end(*region, {0, 1}, stream.get());
  EXPECT_EQ(setup.pager->evict(*region, {0, 1}), 2 * kPage);
  EXPECT_EQ(setup.used_pages(), 0U);
}

TEST(ManagedPagerFaults, PagesThatAFailedStepReadMakeRoomForOthers) {
  PagerSetup setup(4);
  const auto region = setup.reserve(8);
  const OwnedStream stream(setup.spy);
  setup.pager->begin(*region, pages_between(0, 4), stream.get());
  run_on(stream.get(), [] { throw DeviceError("matmul", 1, "the step failed"); });
  setup.pager->end(*region, pages_between(0, 4), stream.get());
  EXPECT_NO_THROW(run_step(*setup.pager, *region, {4, 5}));
  EXPECT_EQ(setup.device->last_suppressed().find("matmul"), 0U);  // and the failure is on record
}

TEST(ManagedPagerFaults, PageStaysWhereTheWaitForItsLoadFails) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  Gate loading;
  setup.spy->on_prefetch = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { loading.wait(); });
  };
  setup.pager->prefetch_ahead(*region, {0});
  ASSERT_TRUE(eventually([&] { return setup.pager->stats().ahead_loads == 1; }));
  setup.device->fail_nth_call_of("event_synchronize", 0);
  EXPECT_THROW(setup.pager->evict(*region, {0}), DeviceError);
  EXPECT_EQ(setup.used_pages(), 1U);  // what is on its way stays charged
  loading.open();
  EXPECT_EQ(setup.pager->evict(*region, {0}), kPage);
}

TEST(ManagedPagerFaults, EvictionThatCouldNotBeWaitedForDoesNotOutliveItsRegion) {
  PagerSetup setup(4);
  auto region = setup.reserve(2);
  const auto other = setup.reserve(2);
  run_step(*setup.pager, *region, {0, 1});
  run_step(*setup.pager, *other, {0, 1});
  Gate evicting;
  setup.spy->on_evict = [&](std::uintptr_t, std::size_t, StreamHandle stream) {
    run_on(stream, [&] { evicting.wait(); });
  };
  setup.device->fail_nth_call_of("stream_synchronize", 0);
  Running evict([&] { setup.pager->evict(*region, {0, 1}); });
  // Were it to return with the eviction under way, it would do so within this time.
  EXPECT_FALSE(eventually([&] { return evict.ended(); }, std::chrono::milliseconds(100)));
  evicting.open();
  EXPECT_THROW(evict.join(), DeviceError);
  region.reset();
  EXPECT_EQ(setup.pager->evict(*other, {0, 1}), 2 * kPage);
  EXPECT_EQ(setup.used_pages(), 0U);
}

// ---- wrong arguments ---------------------------------------------------------------------------

TEST(ManagedPagerFaults, PageThatDoesNotExistChangesNothing) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  ManagedPager& pager = *setup.pager;
  pager.begin(*region, {0, 1}, kCaller);
  EXPECT_THROW(pager.begin(*region, {0, 4}, kCaller), std::out_of_range);
  EXPECT_THROW(pager.prefetch(*region, {0, 4}, kCaller), std::out_of_range);
  EXPECT_THROW(pager.prefetch_ahead(*region, {2, 4}), std::out_of_range);
  EXPECT_THROW(pager.end(*region, {0, 4}, kCaller), std::out_of_range);
  EXPECT_EQ(pager.region_stats(*region).pinned_pages, 2U);
  pager.end(*region, {0, 1}, kCaller);
  EXPECT_EQ(pager.region_stats(*region).pinned_pages, 0U);
  EXPECT_THROW(pager.evict(*region, {0, 4}), std::out_of_range);
  EXPECT_EQ(pager.evict(*region, {0, 1}), 2 * kPage);
}

TEST(ManagedPagerFaults, EndingWhatWasNotBegunChangesNothing) {
  PagerSetup setup(4);
  const auto region = setup.reserve(4);
  setup.pager->begin(*region, {0, 2}, kCaller);
  EXPECT_THROW(setup.pager->end(*region, {0, 1, 2}, kCaller), ScheduleError);
  EXPECT_EQ(setup.pager->region_stats(*region).pinned_pages, 2U);
  setup.pager->end(*region, {0, 2}, kCaller);
  EXPECT_EQ(take_stock(*setup.pager, *region), (Pages{0, 2}));
}

TEST(ManagedPagerFaults, BadSizesAreRefused) {
  const auto device = std::make_shared<HostDevice>();
  const auto budget = std::make_shared<Budget>(kPage);
  for (const std::size_t page_size : {0, 1, 2048, 4096 + 1, 3 * 4096}) {
    EXPECT_THROW(ManagedPager::create(device, budget, page_size), std::invalid_argument);
  }
  const auto pager = ManagedPager::create(device, budget, 4096);
  EXPECT_THROW(pager->reserve(0, Access::kReadMostly), std::invalid_argument);
  EXPECT_THROW(pager->reserve(~std::size_t{0}, Access::kReadMostly), std::invalid_argument);
  EXPECT_THROW(pager->reserve(std::size_t{1} << 43, Access::kReadMostly), std::invalid_argument);
  EXPECT_EQ(pager->reserve(1, Access::kReadMostly)->page_count(), 1U);
}

}  // namespace
}  // namespace penstock
