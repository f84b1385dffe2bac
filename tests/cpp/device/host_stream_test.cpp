// Streams and events of the host device: the order that everything above counts on, and errors that
// reach whoever waits.
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "device/handles.hpp"
#include "error/error.hpp"
#include "support/spying_device.hpp"
#include "support/waiting.hpp"

namespace penstock {
namespace {

using namespace testing;

const std::shared_ptr<HostDevice>& device() {
  static const auto host = std::make_shared<HostDevice>();
  return host;
}

struct Stream : OwnedStream {
  Stream() : OwnedStream(device()) {}
  void submit(std::function<void()> task) const { run_on(get(), std::move(task)); }
  void record(const OwnedEvent& event) const { device()->event_record(event.get(), get()); }
  void wait(const OwnedEvent& event) const { device()->event_wait(get(), event.get()); }
  void synchronize() const { device()->stream_synchronize(get()); }
};

struct Event : OwnedEvent {
  Event() : OwnedEvent(device()) {}
  void wait() const { device()->event_synchronize(get()); }
  bool done() const { return device()->event_done(get()); }
};

void fail() {
  throw DeviceError("copy", 5, "the link is down");
}

TEST(HostStream, RunsItsWorkInOrderAndReturnsAtOnce) {
  std::vector<int> ran;
  Gate gate;
  const Stream stream;
  stream.submit([&] { gate.wait(); });
  for (int i = 0; i < 100; ++i) stream.submit([&ran, i] { ran.push_back(i); });
  gate.open();
  stream.synchronize();
  ASSERT_EQ(ran.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(ran[static_cast<std::size_t>(i)], i);
}

TEST(HostStream, DestructionRunsWhatWasSubmitted) {
  int ran = 0;
  {
    const Stream stream;
    for (int i = 0; i < 10; ++i) stream.submit([&] { ++ran; });
  }
  EXPECT_EQ(ran, 10);
}

TEST(HostStream, EventOrdersOneStreamAfterAnother) {
  bool written = false;  // no atomic: the event must order the two threads
  bool seen = false;
  Gate gate;
  const Event event;
  const Stream writer;
  const Stream reader;
  writer.submit([&] {
    gate.wait();
    written = true;
  });
  writer.record(event);
  reader.wait(event);
  reader.submit([&] { seen = written; });
  EXPECT_FALSE(event.done());
  gate.open();
  reader.synchronize();
  EXPECT_TRUE(seen);
  EXPECT_TRUE(event.done());
}

TEST(HostStream, EventThatWasNeverRecordedHoldsNobodyUp) {
  const Event event;
  const Stream stream;
  stream.wait(event);
  stream.synchronize();
  EXPECT_TRUE(event.done());
  event.wait();
}

TEST(HostStream, ErrorReachesTheNextEventAndTheStreamWorksAgain) {
  int ran = 0;
  const Event first;
  const Event second;
  const Stream stream;
  stream.submit(fail);
  stream.submit([&] { ++ran; });  // skipped: it may count on what failed
  stream.record(first);
  stream.submit([&] { ++ran; });
  stream.record(second);
  EXPECT_THROW(first.wait(), DeviceError);
  EXPECT_THROW(first.wait(), DeviceError);  // whoever asks is told
  EXPECT_TRUE(first.done());
  EXPECT_NO_THROW(second.wait());
  EXPECT_EQ(ran, 1);
}

TEST(HostStream, ErrorReachesTheStreamThatWaits) {
  bool ran = false;
  const Event event;
  const Stream failing;
  const Stream waiting;
  failing.submit(fail);
  failing.record(event);
  waiting.wait(event);
  waiting.submit([&] { ran = true; });
  EXPECT_THROW(waiting.synchronize(), DeviceError);
  EXPECT_FALSE(ran);
  EXPECT_NO_THROW(waiting.synchronize());
  EXPECT_NO_THROW(failing.synchronize());
}

TEST(HostStream, OrderOutlivesAnErrorBeforeIt) {
  bool written = false;
  bool seen = false;
  Gate gate;
  const Event ready;
  const Event told;
  const Stream writer;
  const Stream reader;
  writer.submit([&] {
    gate.wait();
    written = true;
  });
  writer.record(ready);
  reader.submit(fail);
  reader.wait(ready);
  reader.record(told);
  reader.submit([&] { seen = written; });
  // Were the wait skipped with the failed work, `told` would come within this time.
  EXPECT_FALSE(eventually([&] { return told.done(); }, std::chrono::milliseconds(100)));
  gate.open();
  EXPECT_NO_THROW(reader.synchronize());
  EXPECT_THROW(told.wait(), DeviceError);
  EXPECT_TRUE(seen);
}

TEST(HostStream, EventRecordedAgainElsewhereStandsForTheLatestRecord) {
  Gate gate;
  const Event event;
  const Stream slow;
  const Stream quick;
  slow.submit([&] { gate.wait(); });
  slow.record(event);
  quick.record(event);
  quick.synchronize();
  EXPECT_TRUE(event.done());
  event.wait();
  gate.open();
  slow.synchronize();  // the older record ends after the newer one
  EXPECT_TRUE(event.done());
  event.wait();
}

TEST(HostStream, WaiterKeepsTheRecordThatItAskedFor) {
  bool written = false;
  bool seen = false;
  Gate gate;
  const Event event;
  const Stream slow;
  const Stream quick;
  const Stream reader;
  slow.submit([&] {
    gate.wait();
    written = true;
  });
  slow.record(event);
  reader.wait(event);
  quick.submit(fail);
  quick.record(event);
  EXPECT_THROW(event.wait(), DeviceError);
  reader.submit([&] { seen = written; });
  gate.open();
  EXPECT_NO_THROW(reader.synchronize());  // the other record's error is not the reader's
  EXPECT_TRUE(seen);
}

TEST(HostStream, NullStreamIsTheCallingThread) {
  bool written = false;
  Gate gate;
  const Event event;
  const Stream stream;
  stream.submit([&] {
    gate.wait();
    written = true;
  });
  stream.record(event);
  Running caller([&] {
    device()->event_wait(StreamHandle{}, event.get());
    EXPECT_TRUE(written);
  });
  gate.open();
  caller.join();
  const Event own;
  device()->event_record(own.get(), StreamHandle{});
  EXPECT_TRUE(own.done());
}

TEST(HostStream, EventMayGoBeforeTheStreamComesToIt) {
  bool ran = false;
  Gate gate;
  const Stream stream;
  const Stream waiting;
  {
    const Event event;
    stream.submit([&] { gate.wait(); });
    stream.record(event);
    waiting.wait(event);
  }
  waiting.submit([&] { ran = true; });
  gate.open();
  waiting.synchronize();
  EXPECT_TRUE(ran);
}

}  // namespace
}  // namespace penstock
