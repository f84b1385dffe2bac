// How a frames region lives with work that was captured in a graph.
#include <algorithm>

#include "error/error.hpp"
#include "frames/frames_region.hpp"

namespace penstock {

void FramesRegion::forget_shared() {
  for (Place& place : places_) {
    if (place.pages.size() > 1) place.owner = kNobody;
  }
}

void FramesRegion::prepare_capture() {
  const std::lock_guard lock(mutex_);
  require_idle("capture");
  device_->stream_synchronize(copies_.get());
  for (PageIndex page = 0; page < pages_.size(); ++page) {
    quiesce(page);
    pages_[page].readers.clear();
  }
  for (Place& place : places_) place.readers.clear();
  forget_shared();
  fenced_ = true;
}

void FramesRegion::begin_capture(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  const Event start = events_.record(stream);
  device_->event_wait(copies_.get(), start->get());
  const auto shared = std::count_if(places_.begin(), places_.end(),
                                    [](const Place& place) { return place.pages.size() > 1; });
  capture_.emplace();
  capture_->ring = static_cast<std::size_t>(shared);
}

void FramesRegion::end_capture(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  capture_.reset();
  // The events that were recorded meanwhile stand for work of the graph, not of a stream.
  for (Page& page : pages_) {
    // Its bytes come when the graph is launched, not before.
    if (page.ready) places_[page.place].owner = kNobody;
    page.readers.clear();
    page.ready.reset();
  }
  for (Place& place : places_) place.readers.clear();
  forget_shared();
  const Event tail = events_.record(copies_.get());
  device_->event_wait(stream, tail->get());
}

const Event& FramesRegion::replay_end() {
  if (!replay_) replay_ = events_.record(replay_stream_);
  return replay_;
}

void FramesRegion::before_replay(StreamHandle stream, std::uint64_t mappings) {
  const std::lock_guard lock(mutex_);
  require_idle("replay");
  if (mappings != mappings_) {
    throw ScheduleError(
        "the model's weights were given other places since this pass was captured (evicted, given "
        "to others who needed room, or the cap was divided anew): capture it again");
  }
  tier_->require_unchanged();
  order_before_replay(stream);
  replaying_ = true;
}

void FramesRegion::order_before_replay(StreamHandle stream) {
  if (replayed_ && !fenced_) {  // nothing but replays since
    if (stream.value != replay_stream_.value) device_->event_wait(stream, replay_end()->get());
    return;
  }
  if (replayed_) device_->event_wait(stream, replay_end()->get());
  for (PageIndex page = 0; page < pages_.size(); ++page) {  // the graph loads them from the tier
    if (!pages_[page].dirty) continue;
    order_after_readers(page, 1);
    copy_back(page);
  }
  const Event copied = events_.record(copies_.get());
  device_->event_wait(stream, copied->get());
  for (Place& place : places_) {
    for (Use& reader : place.readers) device_->event_wait(stream, event_of(reader)->get());
  }
  forget_shared();
}

void FramesRegion::after_replay(StreamHandle stream) {
  const std::lock_guard lock(mutex_);
  replaying_ = false;
  replayed_ = true;
  replay_stream_ = stream;
  replay_.reset();  // recorded when it is asked for: most replays are followed by another
  fenced_ = false;
}

}  // namespace penstock
