// The stream tier: rings smaller than the model, orders that are followed and orders that are not,
// buffers that wait for their copies, files that fail, and reads past the page cache.
#include "host_tier/stream_tier.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "error/error.hpp"
#include "host_tier/page_layout.hpp"
#include "support/tier_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using Pages = std::vector<PageIndex>;

struct StreamTierTest : ::testing::Test {
  std::unique_ptr<StreamTier> make(const TestModel& model, std::size_t buffers,
                                   std::size_t threads = 2) {
    // A buffer is a page and a block, as extents start anywhere.
    return std::make_unique<StreamTier>(setup.device, model.bytes.size(), kTierPage, model.source,
                                        buffers * (kTierPage + kDirectAlignment), threads);
  }
  std::uint64_t pages_read(const StreamTier& tier) { return tier.stats().read_bytes / kTierPage; }

  TemporaryDirectory directory;
  TierSetup setup;
};

Pages pages_up_to(PageIndex count) {
  Pages pages;
  for (PageIndex page = 0; page < count; ++page) pages.push_back(page);
  return pages;
}

TEST_F(StreamTierTest, ReadsEachPageOnceAPassInAnExpectedOrder) {
  const TestModel model = simple_model(directory, 12);
  const auto tier = make(model, 4);
  tier->expect(pages_up_to(12));
  for (int pass = 0; pass < 5; ++pass) {
    for (PageIndex page = 0; page < 12; ++page) {
      ASSERT_TRUE(fetched_is(setup, *tier, page, model));
    }
  }
  EXPECT_GE(pages_read(*tier), 5U * 12);
  EXPECT_LE(pages_read(*tier), 5U * 12 + 4);  // and what is read ahead for the next pass
  EXPECT_LE(tier->stats().pinned_bytes, 4 * (kTierPage + kDirectAlignment));
}

TEST_F(StreamTierTest, ReadsAheadAsFarAsThereAreBuffers) {
  const TestModel model = simple_model(directory, 12);
  const auto tier = make(model, 4);
  tier->expect(pages_up_to(12));
  EXPECT_TRUE(eventually([&] { return tier->ready(3); }));
  for (PageIndex page = 0; page < 4; ++page) EXPECT_TRUE(tier->ready(page));
  EXPECT_FALSE(tier->ready(4));
  EXPECT_EQ(pages_read(*tier), 4U);
  tier->fetch(0);
  tier->release(0, nullptr);
  EXPECT_TRUE(eventually([&] { return tier->ready(4); }));
}

TEST_F(StreamTierTest, ModelThatFitsIsReadOnce) {
  const TestModel model = simple_model(directory, 3);
  const auto tier = make(model, 8);
  tier->expect(pages_up_to(3));
  for (int pass = 0; pass < 4; ++pass) {
    for (PageIndex page = 0; page < 3; ++page) {
      ASSERT_TRUE(fetched_is(setup, *tier, page, model));
    }
  }
  EXPECT_EQ(pages_read(*tier), 3U);
}

TEST_F(StreamTierTest, PagesThatComeAgainAndEmptyPagesAreFine) {
  TestModel model = simple_model(directory, 6);
  model.source.extents = {{0, 8, 0, 2 * kTierPage},  // page 2 has no bytes at all
                          {0, 8 + 3 * kTierPage, 3 * kTierPage, 3 * kTierPage}};
  std::fill_n(model.given.begin() + 2 * kTierPage, kTierPage, false);
  const auto tier = make(model, 2);
  const Pages order = {0, 1, 0, 2, 3, 3, 0, 4, 5, 2, 0};
  tier->expect(order);
  for (int pass = 0; pass < 3; ++pass) {
    for (const PageIndex page : order) ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  }
  EXPECT_TRUE(tier->ready(2));
  EXPECT_TRUE(tier->fetch(2).empty());
}

TEST_F(StreamTierTest, UnexpectedPagesAreReadWhileAllBuffersHoldOthers) {
  const TestModel model = simple_model(directory, 12);
  const auto tier = make(model, 2);
  tier->expect({0, 1, 2, 3});
  ASSERT_TRUE(eventually([&] { return tier->ready(0) && tier->ready(1); }));
  for (const PageIndex page : {9, 8, 11, 9, 0, 7, 1, 10, 2, 3, 3, 0}) {
    ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  }
  tier->expect({});
  for (const PageIndex page : {9, 8, 11, 9}) {
    ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  }
}

TEST_F(StreamTierTest, FollowsAConsumerThatStartsAgain) {
  const TestModel model = simple_model(directory, 40);
  const auto tier = make(model, 4);
  tier->expect(pages_up_to(40));
  for (PageIndex page = 0; page < 15; ++page) ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  for (PageIndex page = 0; page < 2; ++page) ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  EXPECT_TRUE(eventually([&] { return tier->ready(2) && tier->ready(3) && tier->ready(4); }));
  // One page out of turn does not change where it is.
  ASSERT_TRUE(fetched_is(setup, *tier, 30, model));
  EXPECT_TRUE(eventually([&] { return tier->ready(2) && tier->ready(3) && tier->ready(4); }));
  EXPECT_FALSE(tier->ready(31));
}

TEST_F(StreamTierTest, BufferIsNotReusedBeforeTheCopyFromIt) {
  const TestModel model = simple_model(directory, 8);
  Gate gate;
  OwnedStream stream(setup.device);
  const auto tier = make(model, 2);
  tier->expect(pages_up_to(8));
  Bytes copied(kTierPage);
  const std::vector<Piece>& pieces = tier->fetch(0);
  ASSERT_EQ(pieces.size(), 1U);
  run_on(stream.get(), [&] { gate.wait(); });
  setup.device->copy(copied.data(), pieces[0].source, kTierPage, stream.get());
  tier->release(0, setup.event_now(stream.get()));
  for (PageIndex page = 1; page < 8; ++page) {  // the other buffer serves all
    ASSERT_TRUE(fetched_is(setup, *tier, page, model));
  }
  gate.open();
  setup.device->stream_synchronize(stream.get());
  EXPECT_TRUE(std::equal(copied.begin(), copied.end(), model.bytes.begin()));
  EXPECT_TRUE(eventually([&] { return tier->ready(0) && tier->ready(1); }));
}

TEST_F(StreamTierTest, PageIsFetchedAgainWhileItsCopyIsUnderWay) {
  const TestModel model = simple_model(directory, 8);
  Gate gate;
  OwnedStream stream(setup.device);
  const auto tier = make(model, 2);
  run_on(stream.get(), [&] { gate.wait(); });
  ASSERT_TRUE(page_is(tier->fetch(3), 3, kTierPage, model));
  tier->release(3, setup.event_now(stream.get()));
  ASSERT_TRUE(page_is(tier->fetch(3), 3, kTierPage, model));
  ASSERT_TRUE(page_is(tier->fetch(3), 3, kTierPage, model));  // twice at once
  tier->release(3, setup.event_now(stream.get()));
  tier->release(3, nullptr);
  EXPECT_EQ(pages_read(*tier), 1U);
  gate.open();
}

TEST_F(StreamTierTest, FailedCopyGivesItsBufferBack) {
  const TestModel model = simple_model(directory, 8);
  OwnedStream stream(setup.device);
  const auto tier = make(model, 2);
  for (PageIndex page = 0; page < 8; ++page) {
    ASSERT_TRUE(page_is(tier->fetch(page), page, kTierPage, model));
    run_on(stream.get(), [] { throw std::runtime_error("copy failed"); });
    tier->release(page, setup.event_now(stream.get()));
  }
}

TEST_F(StreamTierTest, AllBuffersFetchedIsAnErrorAndNoHang) {
  const TestModel model = simple_model(directory, 8);
  const auto tier = make(model, 2);
  tier->fetch(0);
  tier->fetch(1);
  EXPECT_THROW(tier->fetch(2), ScheduleError);
  EXPECT_THROW(tier->release(2, nullptr), ScheduleError);
  tier->release(0, nullptr);
  EXPECT_TRUE(fetched_is(setup, *tier, 2, model));
}

TEST_F(StreamTierTest, RingBelowTwoPagesIsRefused) {
  const TestModel model = simple_model(directory, 4);
  EXPECT_THROW(
      StreamTier(setup.device, model.bytes.size(), kTierPage, model.source, 2 * kTierPage - 1),
      std::invalid_argument);
  StreamTier smallest(setup.device, model.bytes.size(), kTierPage, model.source, 2 * kTierPage);
  for (const PageIndex page : {0, 1, 2, 3}) {
    EXPECT_TRUE(fetched_is(setup, smallest, page, model));
  }
}

// ---- errors ------------------------------------------------------------------------------------

TEST_F(StreamTierTest, FileThatIsRemovedMeanwhileIsStillRead) {
  const TestModel model = simple_model(directory, 10);
  const auto tier = make(model, 3);
  std::filesystem::remove(model.source.paths[0]);
  for (PageIndex page = 0; page < 10; ++page) {
    EXPECT_TRUE(fetched_is(setup, *tier, page, model));
  }
}

TEST_F(StreamTierTest, DeviceThatCannotTellWhetherACopyIsOverEndsTheWait) {
  const TestModel model = simple_model(directory, 10);
  struct Broken : HostDevice {
    bool event_done(EventHandle) override { throw DeviceError("broken", 1, "lost"); }
  };
  const auto broken = std::make_shared<Broken>();
  StreamTier tier(broken, model.bytes.size(), kTierPage, model.source, 2 * kTierPage, 1);
  tier.fetch(0);
  tier.fetch(1);  // before anything is released: from then on the tier may have met the error
  tier.release(0, std::make_shared<OwnedEvent>(broken));
  tier.release(1, std::make_shared<OwnedEvent>(broken));
  EXPECT_THROW(tier.fetch(2), DeviceError);
  EXPECT_THROW(tier.fetch(3), DeviceError);
}

// ---- reads -------------------------------------------------------------------------------------

TEST_F(StreamTierTest, FilesOutsideThePageCacheAreReadPastIt) {
  for (std::size_t seed = 20; seed < 24; ++seed) {
    const TestModel model = random_model(directory, seed, 300000);
    for (const auto& path : model.source.paths) {
      if (!drop_cached(path)) GTEST_SKIP() << "the files of this system are never out of memory";
    }
    const auto tier = setup.make("stream", model);
    write_gaps(*tier, model);
    tier->expect(pages_up_to(static_cast<PageIndex>(tier->page_count())));
    for (PageIndex page = 0; page < tier->page_count(); ++page) {
      EXPECT_TRUE(fetched_is(setup, *tier, page, model));
    }
    Bytes bytes(model.bytes.size());
    tier->read(0, bytes.data(), bytes.size());
    for (const auto& path : model.source.paths) EXPECT_EQ(cached_bytes(path), 0U);
  }
}

TEST(PageLayoutTest, ReadsAreAlignedAndTouchingExtentsAreOne) {
  constexpr std::size_t kBlock = kDirectAlignment;
  // Three tensors that follow each other in the file and lie apart in the region; one elsewhere.
  const PageLayout layout = lay_out_page(
      {{0, 10, 512, 100}, {0, 110, 1024, 5000}, {0, 5110, 8192, 50}, {0, 90000, 9000, 4}}, 512,
      std::size_t{1} << 20);
  ASSERT_EQ(layout.reads.size(), 2U);
  EXPECT_EQ(layout.reads[0].file_offset, 0U);
  EXPECT_EQ(layout.reads[0].nbytes, 2 * kBlock);
  EXPECT_EQ(layout.reads[0].needed, 5160U);
  EXPECT_EQ(layout.reads[1].file_offset, 90000 / kBlock * kBlock);
  EXPECT_EQ(layout.reads[1].position, 2 * kBlock);
  EXPECT_EQ(layout.buffer_bytes, 3 * kBlock);
  ASSERT_EQ(layout.parts.size(), 4U);
  EXPECT_EQ(layout.parts[0].position, 10U);
  EXPECT_EQ(layout.parts[0].offset, 0U);
  EXPECT_EQ(layout.parts[2].position, 5110U);
  EXPECT_EQ(layout.parts[3].position, 2 * kBlock + 90000 % kBlock);
  EXPECT_TRUE(lay_out_page({}, 0, kBlock).reads.empty());
}

TEST(PageLayoutTest, LongReadsAreCut) {
  constexpr std::size_t kBlock = kDirectAlignment;
  const PageLayout layout = lay_out_page({{0, kBlock - 1, 0, 5 * kBlock + 2}}, 0, 2 * kBlock);
  ASSERT_EQ(layout.reads.size(), 4U);
  std::size_t needed = 0;
  for (const PageRead& read : layout.reads) needed += read.needed;
  EXPECT_EQ(needed, 6 * kBlock + 1);
  EXPECT_EQ(layout.buffer_bytes, 7 * kBlock);
  EXPECT_EQ(layout.reads.back().nbytes, kBlock);
  EXPECT_EQ(layout.reads.back().needed, 1U);
}

}  // namespace
}  // namespace penstock
