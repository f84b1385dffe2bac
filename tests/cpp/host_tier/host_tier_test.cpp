// What holds for every host tier: each byte in its place however the files are cut, errors that
// name the file, and nothing held that was not given back, whatever fails and whenever it goes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "error/error.hpp"
#include "host_tier/checksums.hpp"
#include "support/tier_setup.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;
using std::chrono::microseconds;
using std::chrono::milliseconds;

struct HostTierTest : ::testing::TestWithParam<const char*> {
  std::unique_ptr<HostTier> make(const TestModel& model, std::size_t page_size = kTierPage) {
    return setup.make(GetParam(), model, page_size);
  }

  TemporaryDirectory directory;
  TierSetup setup;
};

INSTANTIATE_TEST_SUITE_P(Tiers, HostTierTest, ::testing::Values("pinned", "mapped", "stream"),
                         [](const auto& tier) { return std::string(tier.param); });

TEST_P(HostTierTest, GivesEveryByteInItsPlaceInAnyOrder) {
  const std::size_t pages[] = {4096, kTierPage, std::size_t{64} << 10, std::size_t{36} << 10};
  for (std::size_t seed = 0; seed < 8; ++seed) {
    const TestModel model = random_model(directory, seed, 300000 + seed * 1237);
    const auto tier = make(model, pages[seed % 4]);
    write_gaps(*tier, model);
    std::vector<PageIndex> order(tier->page_count());
    for (PageIndex page = 0; page < order.size(); ++page) order[page] = page;
    tier->expect(order);
    ASSERT_TRUE(tier->wait_for(kLongest));
    EXPECT_EQ(tier->done_bytes(), tier->total_bytes());
    for (int pass = 0; pass < 2; ++pass) {
      for (const PageIndex page : order) EXPECT_TRUE(fetched_is(setup, *tier, page, model));
    }
    std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
    for (const PageIndex page : order) EXPECT_TRUE(fetched_is(setup, *tier, page, model));
  }
  setup.expect_nothing_held();
}

TEST_P(HostTierTest, ReadCopiesBytesOut) {
  const TestModel model = random_model(directory, 5, 200001);
  const auto tier = make(model);
  write_gaps(*tier, model);
  std::mt19937_64 random(1);
  for (int i = 0; i < 50; ++i) {
    const std::size_t offset = random() % (model.bytes.size() + 1);
    const std::size_t nbytes = random() % (model.bytes.size() - offset + 1);
    Bytes bytes(nbytes);
    tier->read(offset, bytes.data(), nbytes);
    for (std::size_t at = 0; at < nbytes; ++at) {
      ASSERT_TRUE(!model.given[offset + at] || bytes[at] == model.bytes[offset + at]) << at;
    }
  }
}

TEST_P(HostTierTest, BytesWrittenAgainReplaceThoseBefore) {
  TestModel model;
  model.bytes = pattern(3 * kTierPage, 1);
  model.given.assign(model.bytes.size(), true);
  const auto tier = make(model);
  const Bytes other = pattern(model.bytes.size(), 2);
  tier->write(100, other.data(), 20000);  // over a page's end, and over parts of it again
  tier->write(50, other.data(), 200);
  tier->write(kTierPage - 10, other.data(), 40);
  tier->write(0, model.bytes.data(), model.bytes.size());
  ASSERT_TRUE(tier->wait_for(kLongest));
  for (PageIndex page = 0; page < 3; ++page) {
    EXPECT_TRUE(fetched_is(setup, *tier, page, model));
  }
}

TEST_P(HostTierTest, NothingIsFine) {
  const auto tier = make(TestModel{});
  EXPECT_TRUE(tier->wait_for(kLongest));
  EXPECT_EQ(tier->page_count(), 0U);
  tier->write(0, nullptr, 0);
  tier->read(0, nullptr, 0);
  EXPECT_THROW(tier->fetch(0), std::out_of_range);
}

TEST_P(HostTierTest, TellsWhatItIsAndHolds) {
  const TestModel model = simple_model(directory, 5);
  const auto tier = make(model);
  EXPECT_EQ(tier->kind(), GetParam());
  EXPECT_EQ(tier->nbytes(), model.bytes.size());
  EXPECT_EQ(tier->page_size(), kTierPage);
  ASSERT_TRUE(tier->wait_for(kLongest));
  tier->fetch(2);
  EXPECT_TRUE(tier->ready(2));
  const HostTierStats stats = tier->stats();
  EXPECT_GE(stats.read_bytes, kTierPage);
  if (tier->kind() == "pinned") {
    EXPECT_EQ(stats.pinned_bytes, model.bytes.size());
    EXPECT_EQ(std::memcmp(tier->address(), model.bytes.data(), model.bytes.size()), 0);
  } else {
    EXPECT_EQ(tier->address(), nullptr);
  }
  if (tier->kind() == "mapped") {
    EXPECT_EQ(stats.pinned_bytes, 0U);
    EXPECT_EQ(stats.mapped_bytes, model.bytes.size() + 4096);
  }
  if (tier->kind() == "stream") {
    EXPECT_LE(stats.pinned_bytes, 3 * kTierPage + 4096);
  }
}

TEST_P(HostTierTest, WrongArgumentsAreRefused) {
  const TestModel model = simple_model(directory, 2);
  const auto tier = make(model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  unsigned char byte = 0;
  EXPECT_THROW(tier->fetch(2), std::out_of_range);
  EXPECT_THROW(tier->ready(2), std::out_of_range);
  EXPECT_THROW(tier->write(model.bytes.size(), &byte, 1), std::out_of_range);
  EXPECT_THROW(tier->read(1, &byte, ~std::size_t{0}), std::out_of_range);
  EXPECT_THROW(make(model, 1000), std::invalid_argument);
  EXPECT_THROW(make(model, 0), std::invalid_argument);
  TestModel outside = model;
  outside.source.extents = {{0, 0, 1, model.bytes.size()}};
  EXPECT_THROW(make(outside), std::out_of_range);
  TestModel nowhere = model;
  nowhere.source.extents[0].file = 1;
  EXPECT_THROW(make(nowhere), std::out_of_range);
  setup.expect_nothing_held(tier->kind() == "stream" ? 0 : 1);  // of the tier that is still there
}

// ---- errors ------------------------------------------------------------------------------------

TEST_P(HostTierTest, FileThatIsTooShortIsRefusedAtOnce) {
  const TestModel model = simple_model(directory, 4);
  std::filesystem::resize_file(model.source.paths[0], kTierPage);
  try {
    make(model);
    FAIL() << "made on a truncated file";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.path, model.source.paths[0]);
  }
  std::filesystem::remove(model.source.paths[0]);
  EXPECT_THROW(make(model), CheckpointError);
  setup.expect_nothing_held();
}

// Makes the nth call of a function fail, and does with a tier what is usually done.
TEST_P(HostTierTest, FailureAtAnyPositionLeavesNothingBehind) {
  for (const char* name : {"host_register", "pinned_allocate", "event_done"}) {
    for (std::uint64_t nth = 0;; ++nth) {
      const TestModel model = random_model(directory, 3, 100000);
      setup.device->reset();
      setup.device->fail_nth_call_of(name, nth);
      int errors = 0;
      std::unique_ptr<HostTier> tier;
      try {
        tier = make(model);
        write_gaps(*tier, model);
        tier->wait_for(kLongest);
      } catch (const DeviceError&) {
        ++errors;
      }
      for (PageIndex page = 0; tier && errors == 0 && page < tier->page_count(); ++page) {
        try {
          EXPECT_TRUE(fetched_is(setup, *tier, page, model));
        } catch (const DeviceError&) {
          ++errors;
          EXPECT_TRUE(fetched_is(setup, *tier, page, model)) << "once more";
        }
      }
      const bool fired = setup.device->fired();
      tier.reset();
      const std::uint64_t failed = fired ? 1 : 0;
      const bool asked = std::string(name) == "event_done";
      EXPECT_EQ(errors, fired && !asked ? 1 : 0) << name << " " << nth;
      setup.expect_nothing_held(std::string(name) == "host_register" ? failed : 0,
                                std::string(name) == "pinned_allocate" ? failed : 0);
      if (!fired) break;
    }
  }
}

TEST_P(HostTierTest, FailureToGiveBackIsCounted) {
  const TestModel model = random_model(directory, 3, 100000);
  auto tier = make(model);
  write_gaps(*tier, model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  tier->fetch(0);
  setup.device->fail_nth_call_of("host_unregister", 0);
  tier.reset();
  EXPECT_EQ(setup.device->suppressed_count(), 1U);
  setup.expect_nothing_held();
}

TEST_P(HostTierTest, CanGoAtAnyTime) {
  const TestModel model = random_model(directory, 9, 400000);
  setup.device->delay_calls_of("host_register", microseconds(300));
  for (int i = 0; i < 30; ++i) {
    const auto tier = make(model);
    std::vector<PageIndex> order(tier->page_count());
    for (PageIndex page = 0; page < order.size(); ++page) order[page] = page;
    tier->expect(order);
    tier->wait_for(milliseconds(0));
    std::this_thread::sleep_for(microseconds(50 * i));
  }
  setup.expect_nothing_held();
}

// ---- files that change -------------------------------------------------------------------------

struct ChangingFileTest : HostTierTest {};

INSTANTIATE_TEST_SUITE_P(Tiers, ChangingFileTest, ::testing::Values("mapped", "stream"),
                         [](const auto& tier) { return std::string(tier.param); });

TEST_P(ChangingFileTest, NoPageOfItIsGivenUntilItIsBack) {
  const TestModel model = simple_model(directory, 10);
  const std::string path = model.source.paths[0];
  const auto written = std::filesystem::last_write_time(path);
  Bytes whole(8);
  {
    std::ifstream file(path, std::ios::binary);
    file.read(reinterpret_cast<char*>(whole.data()), 8);
  }
  whole.insert(whole.end(), model.bytes.begin(), model.bytes.end());
  const auto tier = make(model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  EXPECT_TRUE(fetched_is(setup, *tier, 3, model));
  for (int how = 0; how < 3; ++how) {
    if (how == 0) std::filesystem::resize_file(path, 2 * kTierPage + 100);
    if (how == 1) std::filesystem::resize_file(path, 0);
    if (how == 2) overwrite(path, 9 * kTierPage, pattern(100, 5));
    for (int trial = 0; trial < 2; ++trial) {
      for (PageIndex page = 0; page < 10; ++page) {
        EXPECT_FALSE(tier->ready(page)) << page;
        try {
          tier->fetch(page);
          ADD_FAILURE() << "gave page " << page;
        } catch (const CheckpointError& error) {
          EXPECT_EQ(error.path, path);
          EXPECT_EQ(error.offset, page * kTierPage + 8);
        }
      }
      Bytes bytes(100);
      EXPECT_THROW(tier->read(kTierPage, bytes.data(), bytes.size()), CheckpointError);
      EXPECT_THROW(tier->require_unchanged(), CheckpointError);
    }
    directory.write("simple", whole);  // in place: the same file
    std::filesystem::last_write_time(path, written);
    for (PageIndex page = 0; page < 10; ++page) {
      EXPECT_TRUE(fetched_is(setup, *tier, page, model));
    }
  }
}

TEST_P(ChangingFileTest, PagesOfOtherFilesAreGivenAsBefore) {
  TestModel model = simple_model(directory, 4);
  const Bytes other = pattern(kTierPage, 3);
  model.source.paths.push_back(directory.write("other", other));
  model.source.extents.push_back({1, 0, model.bytes.size(), other.size()});
  model.bytes.insert(model.bytes.end(), other.begin(), other.end());
  model.given.resize(model.bytes.size(), true);
  const auto tier = make(model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  std::filesystem::resize_file(model.source.paths[0], 100);
  EXPECT_TRUE(fetched_is(setup, *tier, 4, model));
  EXPECT_THROW(tier->fetch(0), CheckpointError);
}

TEST_P(ChangingFileTest, ChangeThatTimeAndSizeDoNotTellIsFoundByChecksum) {
  const TestModel model = random_model(directory, 5, 200001);
  const auto tier = make(model);
  write_gaps(*tier, model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  const auto bytes_of = [&](PageIndex page) {
    Bytes bytes(kTierPage);
    const std::size_t offset = page * kTierPage;
    tier->read(offset, bytes.data(), std::min(kTierPage, model.bytes.size() - offset));
    return bytes;
  };
  const auto verify = [&](PageIndex page) {
    const Bytes bytes = bytes_of(page);
    tier->verify(page, reinterpret_cast<const std::byte*>(bytes.data()));
  };
  for (int pass = 0; pass < 2; ++pass) {
    for (PageIndex page = 0; page < tier->page_count(); ++page) verify(page);
  }
  const Extent& extent = model.source.extents[model.source.extents.size() / 2];
  const auto page = static_cast<PageIndex>(extent.region_offset / kTierPage);
  const std::string path = model.source.paths[extent.file];
  const auto before = static_cast<unsigned char>(model.bytes[extent.region_offset]);
  overwrite_unseen(path, extent.file_offset, {static_cast<unsigned char>(before ^ 1)});
  try {
    verify(page);
    FAIL() << "not noticed";
  } catch (const CheckpointError& error) {
    EXPECT_EQ(error.path, path);
    EXPECT_LE(error.offset, extent.file_offset);
  }
}

TEST(ChecksumTest, OneByteThatDiffersIsSeenWhereverItIs) {
  for (const std::size_t nbytes : {0, 1, 7, 8, 31, 32, 33, 95, 96, 1000}) {
    Bytes bytes = pattern(nbytes, nbytes);
    const auto sum = [&] {
      return checksum(reinterpret_cast<const std::byte*>(bytes.data()), nbytes);
    };
    const std::uint64_t whole = sum();
    for (unsigned char& byte : bytes) {
      for (const int bit : {0, 3, 7}) {
        byte = static_cast<unsigned char>(byte ^ (1 << bit));
        EXPECT_NE(sum(), whole);
        byte = static_cast<unsigned char>(byte ^ (1 << bit));
      }
    }
    EXPECT_EQ(sum(), whole);
    bytes.push_back(0);  // a zero more is another sum
    EXPECT_NE(checksum(reinterpret_cast<const std::byte*>(bytes.data()), nbytes + 1), whole);
  }
}

// ---- pinned ------------------------------------------------------------------------------------

TEST(PinnedTierTest, FileThatShrinksMeanwhileIsNamed) {
  TemporaryDirectory directory;
  TierSetup setup;
  const TestModel model = simple_model(directory, 40);
  for (int i = 0; i < 20; ++i) {
    std::filesystem::resize_file(model.source.paths[0], model.bytes.size() + 8);
    const auto tier = setup.make("pinned", model);
    std::filesystem::resize_file(model.source.paths[0], 1000);
    try {
      EXPECT_TRUE(tier->wait_for(kLongest));  // it was faster
    } catch (const CheckpointError& error) {
      EXPECT_EQ(error.path, model.source.paths[0]);
      EXPECT_THROW(tier->fetch(39), CheckpointError);  // whoever asks is told
      EXPECT_THROW(tier->wait_for(kLongest), CheckpointError);
    }
  }
  setup.expect_nothing_held();
}

TEST(PinnedTierTest, LeavesOneCopyInMemoryUnlessTold) {
  TemporaryDirectory directory;
  TierSetup setup;
  const TestModel model = simple_model(directory, 500);
  const std::string path = model.source.paths[0];
  if (!drop_cached(path)) GTEST_SKIP() << "the files of this system are never out of memory";
  for (const auto cache : {PageCache::kSpare, PageCache::kUse}) {
    PinnedTier tier(setup.device, model.bytes.size(), kTierPage, model.source, 3, cache);
    ASSERT_TRUE(tier.wait_for(kLongest));
    EXPECT_EQ(std::memcmp(tier.address(), model.bytes.data(), model.bytes.size()), 0);
    const std::size_t cached = cached_bytes(path);
    EXPECT_TRUE(cache == PageCache::kSpare ? cached == 0 : cached >= model.bytes.size()) << cached;
  }
}

TEST(PinnedTierTest, PageCanBeFetchedWhileOthersAreRegistered) {
  TemporaryDirectory directory;
  TierSetup setup;
  setup.device->delay_calls_of("host_register", milliseconds(50));
  TestModel model = simple_model(directory, 4);
  const auto tier = setup.make("pinned", model);
  EXPECT_FALSE(tier->wait_for(milliseconds(0)));
  EXPECT_TRUE(page_is(tier->fetch(3), 3, kTierPage, model));  // waits
  EXPECT_TRUE(tier->ready(3));
  tier->write(5, "abc", 3);  // at any time
  std::string text(3, ' ');
  tier->read(5, text.data(), 3);
  EXPECT_EQ(text, "abc");
}

// ---- mapped ------------------------------------------------------------------------------------

TEST(MappedTierTest, GivesUpOnACallThatDoesNotReturnAndLeavesItItsMemory) {
  TemporaryDirectory directory;
  TierSetup setup;
  const TestModel model = simple_model(directory, 4);
  setup.device->delay_calls_of("host_register", milliseconds(300));
  const auto start = std::chrono::steady_clock::now();
  {
    MappedTier tier(setup.device, model.bytes.size(), kTierPage, model.source, milliseconds(20));
    for (int i = 0; i < 2; ++i) {
      try {
        tier.wait_for(kLongest);
        FAIL() << "no limit";
      } catch (const DeviceError& error) {
        EXPECT_NE(std::string(error.what()).find("host=\"pinned\""), std::string::npos);
      }
    }
    EXPECT_THROW(tier.fetch(0), DeviceError);
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, milliseconds(250));
  EXPECT_TRUE(eventually([&] { return setup.device->calls()["host_unregister"] == 1; }));
  EXPECT_TRUE(eventually([&] { return setup.device.use_count() == 1; }));  // the thread is gone
}

TEST(MappedTierTest, RefusalSaysWhatToDo) {
  TemporaryDirectory directory;
  TierSetup setup;
  const TestModel model = simple_model(directory, 4);
  setup.device->fail_nth_call_of("host_register", 0);
  const auto tier = setup.make("mapped", model);
  for (int i = 0; i < 2; ++i) {
    try {
      tier->wait_for(kLongest);
      FAIL() << "not refused";
    } catch (const DeviceError& error) {
      EXPECT_EQ(error.call, "host_register");
      EXPECT_NE(std::string(error.what()).find("host=\"pinned\""), std::string::npos);
    }
  }
}

TEST(MappedTierTest, RegistersOnlyWhatIsNeededAndWritesNothingOfFiles) {
  TemporaryDirectory directory;
  TierSetup setup;
  const std::string path = directory.write("file", pattern(1000000, 1));
  TestModel model;
  model.bytes.resize(2 * kTierPage);
  model.source = {{path}, {{0, 500000, 0, 100}, {0, 100, 200, 5000}, {0, 5100, 5300, 100}}};
  const auto tier = setup.make("mapped", model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  EXPECT_EQ(tier->stats().mapped_bytes, 3U * 4096);
  unsigned char byte = 0;
  EXPECT_THROW(tier->write(99, &byte, 1), std::invalid_argument);
  tier->write(100, &byte, 1);
  EXPECT_GT(tier->stats().pinned_bytes, 0U);
}

TEST(MappedTierTest, FileThatShrinksBetweenLookAndCopyIsAnErrorOfTheCopy) {
  TemporaryDirectory directory;
  TierSetup setup;
  const TestModel model = simple_model(directory, 4);
  const auto tier = setup.make("mapped", model);
  ASSERT_TRUE(tier->wait_for(kLongest));
  Bytes target(kTierPage);
  const OwnedStream stream(setup.device);
  const std::vector<Piece> pieces = tier->fetch(3);
  std::filesystem::resize_file(model.source.paths[0], 100);
  for (const Piece& piece : pieces) {
    ASSERT_NE(piece.file, nullptr);
    setup.device->copy_mapped(target.data(), piece.source, *piece.file, piece.file_offset,
                              piece.nbytes, stream.get());
  }
  const auto copied = setup.event_now(stream.get());
  EXPECT_THROW(setup.device->event_synchronize(copied->get()), CheckpointError);
}

TEST(MappedTierTest, ExtentsThatOverlapAreRefused) {
  TemporaryDirectory directory;
  TierSetup setup;
  TestModel model = simple_model(directory, 2);
  model.source.extents = {{0, 0, 0, 100}, {0, 0, 99, 10}};
  EXPECT_THROW(setup.make("mapped", model), std::invalid_argument);
  EXPECT_THROW(setup.make("stream", model), std::invalid_argument);
}

}  // namespace
}  // namespace penstock
