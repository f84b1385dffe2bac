// A paged model is one model's region as the operations of a program see it. Every operation that
// reads or writes bytes of the region is a step: it has its pages brought in and held while it is
// issued, and nothing is held between operations.
//
// Words: a step is told by its operation and the bytes that it reads. A pass is a sequence of steps
// that comes over and over. A call of the whole model begins one, and what comes after the call (a
// backward pass, an optimizer) belongs to it, until the next call. Where there are no such calls, a
// pass begins where the step that began the one before comes again. Steps of a pass are those of
// the thread that began it, and of backward passes in any thread; steps of other threads run beside
// it, unforeseen.
//
// When a pass has ended the learner says what to expect of the next one, and whoever plans is told,
// on the thread that ended it and with no lock held. Before anything is known, pages are expected
// in the order of a guess: the tensors as they lie in the region.
//
// Owned by the storages of the tensors on the region: who holds such a tensor can read it, whatever
// has become of its module and its manager. Thread-safe: operations of several threads may hold
// pages at once, and one that has no room beside others waits until these have been issued.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "error/error.hpp"
#include "paging/paging_api.hpp"
#include "paging/pass_learner.hpp"
#include "region/region.hpp"
#include "streamer/streamer.hpp"

namespace penstock {

/// A tensor on a region, for messages and for the guess.
struct TensorPlace {
  std::size_t offset;
  std::size_t nbytes;
  std::size_t slice_nbytes;  ///< The least that is read at once: all of it, or one of a stack. 0
                             ///< where nothing is guessed of it.
  std::string name;
};

/// How a pass has ended.
struct PassEnd {
  StepId first = 0;      ///< Tells the kind of the pass.
  bool changed = false;  ///< Whether the expected order of its kind is new.
};

class PagedModel {
 public:
  /// @param tensors  Ascending by offset, not overlapping.
  PagedModel(std::string name, std::shared_ptr<Streamer> streamer, std::shared_ptr<Region> region,
             std::vector<TensorPlace> tensors);
  PagedModel(const PagedModel&) = delete;
  PagedModel& operator=(const PagedModel&) = delete;

  const std::shared_ptr<Region>& region() const noexcept { return region_; }
  const std::shared_ptr<Streamer>& streamer() const noexcept { return streamer_; }

  /// What one operation holds here.
  struct Hold {
    StepId step = 0;
    bool in_place = false;  ///< Its pages stay, so the streamer was not asked.
    bool written = false;
    std::shared_ptr<const std::vector<PageIndex>> pages;
  };

  /// An operation begins. @return what `end` takes.
  /// @throws CapExceededError and CheckpointError naming the operation and its tensors, ModelError
  ///         where it writes and that could not be kept, ScheduleError on a stream that somebody
  ///         else captures; nothing is held then.
  /// @param patient  Whether to wait for operations of other threads where there is no room.
  Hold begin(const PagingOperation& operation, const PagingRange* ranges, std::size_t count,
             bool patient = true);
  /// The operation has been issued, or has failed.
  void end(const Hold& hold, const PagingOperation& operation, const PagingRange* ranges,
           std::size_t count);

  /// What `begin` does, where it finds all in place to stay, knows the step, and need not wait for
  /// anybody; nothing may be written. @return whether that is so; if not, nothing has happened.
  bool begin_at_once(const PagingOperation& operation, const PagingRange* ranges, std::size_t count,
                     Hold& hold);
  /// What `end` does, if it need not wait. @return whether it was done.
  bool end_at_once(const Hold& hold, StreamHandle stream);
  /// Whether an address is on its region.
  bool contains(const void* address) const;

  /// Lets go of what nothing was written to.
  void let_go(const Hold& hold, StreamHandle stream);

  /// What is held for somebody who has taken an address.
  struct AddressHold {
    std::shared_ptr<const std::vector<PageIndex>> pages;
    std::size_t offset = 0;
    std::size_t nbytes = 0;
    StreamHandle stream;
  };

  /// Has the pages of a range in place for work of the operation's stream that nobody sees, and
  /// that may write to them. @param patient  Whether to wait for other threads where there is no
  /// room. @throws as `begin` does, but not for tiers that cannot keep writes.
  AddressHold hold_address(const PagingOperation& operation, PagingRange range, bool patient);
  /// Lets go of it, on any thread. What a tier can keep counts as written.
  void let_go(const AddressHold& hold);

  /// A call of the whole model begins, in this thread.
  void begin_call();
  /// It has ended.
  /// @param complete  Whether the pass ends with it, as no backward pass can follow.
  void end_call(StreamHandle stream, bool failed, bool complete);
  /// Whether a call is under way.
  bool in_call() const;

  /// What is expected of passes that begin with a step; empty if nothing is known.
  std::vector<StepId> order(StepId first) const;
  /// The steps that are expected now, the guess if need be.
  std::vector<StepId> expected() const;
  std::vector<PageIndex> pages(StepId step) const;
  std::string describe(StepId step) const;
  /// Names of the tensors of which a step reads something.
  std::vector<std::string> tensors(StepId step) const;

  using PassHandler = std::function<void(const PassEnd&)>;
  /// Has a function called when a pass has ended; null for none.
  void on_pass(PassHandler handler);
  using UseHandler = std::function<void()>;
  /// Has a function called once, before the next operation.
  void on_next_use(UseHandler handler);
  /// Says how much may be in place at once, in bytes.
  void set_room(std::size_t nbytes) { room_ = nbytes; }
  /// How many bytes a part of an operation over lists is best given, of those of its ranges that
  /// are here; SIZE_MAX where it need not be divided.
  std::size_t part_bytes(const PagingRange* ranges, std::size_t count) const;

  /// While a pass is captured, it is not learned from.
  void set_capturing(bool capturing);

 private:
  using Bytes = std::pair<std::size_t, std::size_t>;  // offset and size
  struct Step {
    const void* operation;
    std::string name;
    std::vector<Bytes> ranges;
    std::shared_ptr<const std::vector<PageIndex>> pages;
  };
  enum class State : std::uint8_t {
    kOutside,    // no pass
    kCall,       // a call is under way
    kAfterCall,  // it has ended, its pass has not
    kAlone,      // a pass that no call began
  };

  /// The pages of ranges, ascending.
  std::vector<PageIndex> pages_of(const std::vector<Bytes>& ranges) const;
  /// The step of the guess that stands for the largest of the ranges.
  StepId guess_for(const PagingRange* ranges, std::size_t count) const;
  std::size_t offset_of(const PagingRange& range) const;
  /// The tensor at an offset; the last one before it where there is none.
  std::size_t tensor_at(std::size_t offset) const;
  void tell_of_use();
  void tell_of_pass(const PassEnd& end);
  void require_writable(const PagingOperation& operation, const PagingRange* ranges,
                        std::size_t count) const;
  /// Begins a step for which there was no room, after operations of other threads.
  void begin_after_others(const Hold& hold, StepId at, StreamHandle stream);
  void drop_holder() noexcept;
  CapExceededError explain(StepId step, const CapExceededError& error) const;
  CheckpointError explain(StepId step, const CheckpointError& error) const;

  // With mutex_ held.
  /// Whether somebody else captures a graph on the stream.
  bool is_captured(StreamHandle stream) const;
  StepId find_step(const PagingOperation& operation, const PagingRange* ranges, std::size_t count);
  std::optional<StepId> known_step(const PagingOperation& operation, const PagingRange* ranges,
                                   std::size_t count) const;
  std::size_t hash_of(const PagingOperation& operation, const PagingRange* ranges,
                      std::size_t count) const;
  void drop_holder_of_this_thread() noexcept;
  StepId add_step(const void* operation, std::string name, std::vector<Bytes> ranges);
  bool is_mine(bool in_backward) const;
  bool begins_pass(StepId step, bool in_backward) const;
  /// Closes the pass, tells of it without the lock, and opens the next one.
  void change_pass(StepId first, StreamHandle stream, std::unique_lock<std::mutex>& lock);
  void open_pass(StepId first, StreamHandle stream);
  /// @param worth_learning  Whether such a pass may come again. @return what to tell of it, if any.
  std::optional<PassEnd> close_pass(StreamHandle stream, bool worth_learning);
  void follow_order_of(StepId first);
  /// Counts an operation that begins: as a step of the pass, if it is one, and as one that holds
  /// pages. @return whether it is a step of the pass.
  bool count_in(StepId step, bool in_backward);
  /// Notes a step of the pass.
  void note(StepId step);
  bool goes_round() const;

  const std::string name_;
  const std::shared_ptr<Region> region_;
  const std::shared_ptr<Streamer> streamer_;
  const std::vector<TensorPlace> tensors_;
  std::vector<StepId> guess_of_tensor_;  // its first step

  mutable std::mutex mutex_;
  std::vector<Step> steps_;  // by id
  std::unordered_multimap<std::size_t, StepId> step_ids_;
  PassLearner learner_;
  State state_ = State::kOutside;
  bool call_begun_ = false;  // since the last step
  std::thread::id caller_;   // who began it
  bool capturing_ = false;
  std::thread::id owner_;               // of the pass
  std::vector<StepId> pass_;            // its steps so far
  std::size_t distinct_ = 0;            // steps of it, each counted once
  std::vector<std::uint32_t> seen_in_;  // by step: number of the last pass that had it
  std::uint32_t pass_number_ = 0;
  std::size_t beside_ = 0;        // steps of other threads since it began
  std::vector<StepId> followed_;  // the order that the streamer has
  std::size_t place_ = 0;         // in it, of the next step
  bool guessing_ = true;          // it is the guess

  std::vector<std::thread::id>
      holders_;                      // a thread for each operation that holds pages, or tries to
  std::uint64_t dropped_ = 0;        // of them, so far
  std::condition_variable changed_;  // one has gone
  std::mutex waiting_;               // held by who waits for room

  std::mutex handlers_mutex_;
  std::shared_ptr<const PassHandler> on_pass_;
  std::shared_ptr<const UseHandler> on_next_use_;
  std::atomic<bool> tells_of_use_{false};
  std::atomic<std::size_t> room_{std::numeric_limits<std::size_t>::max()};
};

}  // namespace penstock
