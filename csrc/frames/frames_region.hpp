// A region of reserved addresses under which frames are mapped. A page is readable while the frame
// mapped under it holds its bytes. Several pages may be mapped onto one frame, once and for all, as
// aliases: then which of them is valid at a moment is what was copied last. So the hot path of
// streaming is copies and events: no mapping, no waiting, no allocation.
//
// Words: a place is a frame that the region holds; its owner is the page whose bytes are in it, if
// any. A page that is the owner of its place is "in place". Every other page mapped onto that place
// reads the owner's bytes, so who reads a page brackets that with `begin` and `end`.
//
// What is never broken: the copy that brings a page in waits, on the device, for the last use of
// the place's owner, and is issued only when the owner is not in use and, if it was not demanded,
// not needed sooner than the page that comes in. A page's mapping changes only when no work that
// was given to the device can still use it; there the host waits.
//
// `arrange` says which pages have a place to themselves and how the others share; without it, or
// where pages in use collide on one place, pages are given places as they are demanded. Device
// memory held is the places, and nothing else.
//
// Frames are given back where others need room under the cap: all that is not in use while nobody
// uses the model (`set_active`), else pages with a frame to themselves, the farthest next use
// first, then frames of the ring down to what the largest step needs, and those too for an
// operation under way that reads others. Pages that lose their frame are demanded when they are
// needed, until `arrange` says anew how to share what is left.
//
// Bytes come from a host tier, and pages that were written to go back to it before they leave their
// place. Thread-safe; the host waits for the device only in `arrange`, `evict`, `flush`, and
// demands that need another mapping, and for the tier where its bytes are still being read.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "device/event_pool.hpp"
#include "device/handles.hpp"
#include "error/error.hpp"
#include "frame_pool/frame_pool.hpp"
#include "host_tier/host_tier.hpp"
#include "region/region.hpp"
#include "schedule/schedule.hpp"

namespace penstock {

/// Which pages share a frame. `slot[page]` is a number below `ring`, or kOwnFrame.
struct Arrangement {
  static constexpr std::uint32_t kOwnFrame = std::numeric_limits<std::uint32_t>::max();
  std::vector<std::uint32_t> slot;
  std::size_t ring = 0;
};

/// What a region has done since it was made.
struct FramesStats {
  std::uint64_t loaded_bytes = 0;
  std::uint64_t written_back_bytes = 0;
  std::uint64_t demand_loads = 0;  ///< Pages that `begin` had to load.
  std::uint64_t remaps = 0;        ///< Pages that were mapped elsewhere outside of `arrange`.
};

class FramesRegion : public Region {
 public:
  /// Reserves addresses for the tier's bytes; no frame is taken yet. Pages are as large as the
  /// pool's frames, and so must be the tier's.
  static std::shared_ptr<FramesRegion> create(std::shared_ptr<FramePool> pool,
                                              std::shared_ptr<HostTier> tier);
  /// Waits for all work that was given to the device, and gives the frames back.
  ~FramesRegion() override;

  bool begin(const std::vector<PageIndex>& pages, StreamHandle stream) override;
  bool begin_in_place(const std::vector<PageIndex>& pages) override;
  bool end_in_place(const std::vector<PageIndex>& pages, StreamHandle stream) override;
  void end(const std::vector<PageIndex>& pages, StreamHandle stream) override;
  bool settled(const std::vector<PageIndex>& pages, StreamHandle stream) const override;
  std::size_t evict(const std::vector<PageIndex>& pages) override;
  void set_schedule(std::vector<std::vector<PageIndex>> steps) override;
  void advance(StepIndex step) override;
  std::size_t load_ahead(const std::vector<PageIndex>& pages) override;
  std::size_t ahead_batch() const override { return 64; }
  std::size_t ahead_window() const override { return std::numeric_limits<std::size_t>::max(); }
  std::size_t least_load() const override { return least_load_; }
  RegionStats stats() const override;

  /// Takes or gives back frames, and maps pages as told; pages in place stay so where they can.
  /// Waits a moment for pages that are in use.
  /// @throws CapExceededError where the cap does not allow so many frames, ScheduleError where
  ///         pages stay in use; nothing has changed then.
  void arrange(const Arrangement& arrangement);
  std::size_t frame_count() const;
  /// Whether the model is in use; one that is not gives everything back when others need it.
  void set_active(bool active);
  /// Nobody is in charge of the model any more: who has a tensor reads it from what others leave.
  void retire();
  /// Whether nothing is given to others.
  void set_protected(bool is_protected);
  /// Grows whenever a page is mapped elsewhere: what was captured before holds no more.
  std::uint64_t mappings() const;

  void require_writable() const override;
  bool keeps_writes() const override;
  /// The pages are copied to the tier before they leave their place.
  void note_write(std::size_t offset, std::size_t nbytes, StreamHandle stream) override;
  void flush() override;

  /// Whether all pages that were in use count as written to, for who cannot say which were.
  /// @throws ModelError where the tier cannot be written.
  void set_writable(bool writable);

  /// Whether every load is compared with its source, and pages are overwritten once they were used.
  void set_verify(bool verify);

  // A pass that is captured in a graph starts with nothing in shared places and loads all it needs,
  // so that it can be replayed at any time. The region tracks eager work by events, which a graph
  // has none of: replays are bracketed instead.
  /// Waits for all work, and forgets what is in shared places. @throws ScheduleError where pages
  /// are in use.
  void prepare_capture();
  /// `stream` captures now: orders the copies to come after it, as part of the capture.
  void begin_capture(StreamHandle stream);
  /// Orders `stream` after all copies since; the capture can end.
  void end_capture(StreamHandle stream);
  /// Before captured work is launched on `stream`: orders it after all other uses, and keeps pages
  /// where they are until `after_replay`. @param mappings  As they were when it was captured.
  /// @throws ScheduleError where they have changed, or pages are in use.
  void before_replay(StreamHandle stream, std::uint64_t mappings);
  /// After it was launched: orders all other uses after it.
  void after_replay(StreamHandle stream);

  const std::shared_ptr<HostTier>& tier() const noexcept { return tier_; }
  StreamHandle copy_stream() const noexcept { return copies_.get(); }
  FramesStats frames_stats() const;

 private:
  using PlaceIndex = std::uint32_t;
  static constexpr PlaceIndex kNowhere = std::numeric_limits<PlaceIndex>::max();
  static constexpr PageIndex kNobody = std::numeric_limits<PageIndex>::max();

  /// The event behind a use is recorded when somebody has to wait for it, or for a later one of its
  /// stream: most uses are of pages that stay, and nobody ever does. So a stream has to outlive the
  /// pages that it used.
  struct Use {
    void* stream;
    std::uint64_t number;  // ascending in time
    Event event;           // null: not recorded yet
  };
  struct StreamEnd {
    std::uint64_t number = 0;  // of the last use that the event is behind
    Event event;
  };
  using Uses = std::vector<Use>;

  struct Page {
    PlaceIndex place = kNowhere;
    std::uint32_t pins = 0;
    Event ready;                 // its load; null: known to be over
    Uses readers;                // of its addresses
    std::uint64_t load = 0;      // number of the last
    std::uint64_t last_use = 0;  // or load
    bool used = false;           // since it was loaded
    bool dirty = false;          // the tier does not have what was written to it
    bool copied_back = false;    // maybe still, through its addresses
  };
  struct Place {
    Frame frame;
    PageIndex owner = kNobody;
    std::vector<PageIndex> pages;  // all that are mapped onto it
    Uses readers;                  // of its memory, since the last copy into it
  };

  /// While a pass is captured. What a stream of the graph is ordered after already, by number: what
  /// follows from that needs no edge, and edges are what a launch costs.
  struct Capture {
    std::size_t ring = 0;  // places that pages share
    std::size_t copies = 0;
    std::uint64_t newest = 0;  // load
    /// The most pages of one copy for several steps: half of the ring, as the other half is read;
    /// of an odd one, in turn.
    std::size_t most() const { return std::max<std::size_t>(1, (ring + copies % 2) / 2); }
    std::unordered_map<void*, std::uint64_t> loads;  // that a stream is ordered after
    std::unordered_map<void*, std::uint64_t> uses;   // on a stream, that the copies are after
  };

  FramesRegion(std::shared_ptr<FramePool> pool, std::shared_ptr<HostTier> tier);

  bool begin_pages(const std::vector<PageIndex>& pages, StreamHandle stream);

  class Room;  // a source of room
  static void offer_room(const std::shared_ptr<FramesRegion>& region);

  /// Asks all but this region for room, for an operation under way. @return whether there is some.
  bool ask_others(std::size_t nbytes) const;
  /// Gives back what others need more. @return bytes given back.
  std::size_t give_back(RoomRank rank, std::size_t nbytes);

  // All with mutex_ held.
  std::byte* address_of(PageIndex page) const { return address_ + std::size_t{page} * page_size_; }
  void check_pages(const std::vector<PageIndex>& pages) const;
  bool in_place(const Page& page, PageIndex index) const {
    return page.place != kNowhere && places_[page.place].owner == index;
  }
  bool is_free(const Place& place) const {
    return place.owner == kNobody || pages_[place.owner].pins == 0;
  }
  bool may_load(PageIndex page);
  void find_least_load();
  /// How many pages, from pages[start] on, to load by one copy now; 0 for none yet.
  std::size_t run_to_load(const std::vector<PageIndex>& pages, std::size_t start);
  /// The same for a pass that is captured: how many would be best, whether there is room or not.
  std::size_t run_to_capture(const std::vector<PageIndex>& pages, std::size_t start,
                             std::size_t together) const;
  /// While a pass is captured: whether the next step can run only after the newest copy, so that
  /// the link would idle meanwhile, were none behind it.
  bool waits_for_newest() const;
  /// Loads pages that follow each other by one copy, as far as their bytes lie together.
  void load(PageIndex first, std::size_t count, bool demanded);
  void add_pieces(std::vector<Piece>& pieces, PageIndex page, PageIndex first);
  void copy_in(PageIndex page, const std::vector<Piece>& pieces);
  void verify_load(PageIndex page, const std::vector<Piece>& pieces);
  void poison(Place& place);
  /// First byte of the tier. @throws ModelError where it cannot be written.
  std::byte* writable_tier() const;
  /// Has a page that may have been written to copied back, where that is wanted, behind its readers
  /// as the stream of copies knows them. @return whether it is.
  bool copy_back(PageIndex page);
  void order_after_readers(PageIndex first, std::size_t count);
  /// The uses of places that the copies have to be ordered after.
  Uses uses_to_await(PageIndex first, std::size_t count);
  /// Remembers the last use on each stream.
  static void note(Uses& uses, const Use& use);
  /// An event behind a use.
  const Event& event_of(Use& use);
  void wait_for_idle(std::unique_lock<std::mutex>& lock);
  void forget_shared();
  const Event& replay_end();
  void order_before_replay(StreamHandle stream);
  void require_idle(const char* what) const;
  /// Loads pages[start], and those after it that one copy can bring as well.
  void demand(const std::vector<PageIndex>& pages, std::size_t start);
  /// Sees to it that the page is mapped onto a place that nobody reads.
  void place(PageIndex page);
  bool has_room(PageIndex page) const {
    return pages_[page].place != kNowhere && is_free(places_[pages_[page].place]);
  }
  /// Whether a page is mapped onto the place of one of those from `first` on before it.
  bool shares_place(PageIndex page, PageIndex first) const;
  /// Orders `stream` after the page's load. @throws what the load threw, if that is known.
  void order_after_load(Page& page, StreamHandle stream);
  /// Whether the stream is ordered after it already, by the copy that it waited for last.
  bool ordered_after(const Event& load, StreamHandle stream) const;
  /// Ends a use of pages that are in use.
  void let_go(const std::vector<PageIndex>& pages, StreamHandle stream);
  void unpin(const std::vector<PageIndex>& pages);
  /// Makes the page's bytes be loaded anew, unless somebody reads them.
  void forget(PageIndex page);
  PlaceIndex find_place();
  PlaceIndex add_place();
  CapExceededError refusal(std::size_t frames) const;
  /// Waits until nothing on the device can use the page's mapping, and what was written is kept.
  void quiesce(PageIndex page);
  void map(PageIndex page, PlaceIndex place);
  void unmap(PageIndex page);
  /// Places to give up for a rank, the best first, and no more than may go.
  std::vector<PlaceIndex> places_to_give(RoomRank rank) const;
  /// Gives up places onto which nothing is mapped. @return bytes given back.
  std::size_t drop_empty_places();
  void settle_copies() noexcept;

  std::shared_ptr<FramePool> pool_;
  std::shared_ptr<HostTier> tier_;
  AddressRange memory_;

  mutable std::mutex mutex_;
  std::condition_variable idle_;  // no page is in use
  std::size_t pins_ = 0;          // of all pages
  std::vector<Page> pages_;
  std::vector<Place> places_;
  bool arranged_ = false;
  bool active_ = true;
  bool protected_ = false;
  bool retired_ = false;
  std::size_t largest_step_ = 0;  // pages
  std::size_t ring_ = 0;          // places that pages share
  std::atomic<std::size_t> least_load_{1};
  std::uint64_t mappings_ = 0;
  bool verify_ = false;
  bool writable_ = false;
  std::optional<Capture> capture_;
  bool replaying_ = false;  // from before_replay to after_replay
  bool replayed_ = false;
  StreamHandle replay_stream_;  // of the last replay
  Event replay_;                // its end; null: not recorded yet
  bool fenced_ = true;          // the copies are ordered after it
  Schedule schedule_;
  StepTime now_ = 0;
  std::uint64_t uses_ = 0;
  std::unordered_map<void*, StreamEnd> stream_ends_;
  std::unordered_map<void*, Event> awaited_;  // load that a stream was ordered after last
  FramesStats stats_;

  bool waits_pass_errors_;
  EventPool events_;
  EventPool timed_events_;
  std::vector<std::byte> loaded_;  // what verify looks at; outlives the copies into it
  OwnedStream copies_;
  std::vector<std::shared_ptr<RoomSource>> sources_;
};

}  // namespace penstock
