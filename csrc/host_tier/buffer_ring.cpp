#include "host_tier/buffer_ring.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <string>
#include <utility>

#include "error/error.hpp"

namespace penstock {

namespace {

// Far below the time of reading a page, and cheap: a device's own wait may keep a core busy.
constexpr std::chrono::microseconds kBetweenQuestions{200};
constexpr int kMostFailures = 5;

}  // namespace

BufferRing::BufferRing(std::shared_ptr<Device> device, const OpenSource& source,
                       std::vector<PageLayout> layouts, std::size_t count, std::size_t buffer_bytes,
                       std::size_t threads)
    : device_(std::move(device)),
      source_(source),
      layouts_(std::move(layouts)),
      slab_(device_, count * buffer_bytes),
      buffer_bytes_(buffer_bytes),
      buffers_(count),
      buffer_of_(layouts_.size()),
      failed_(layouts_.size()),
      order_(count) {
  for (std::size_t i = 0; i < count; ++i) buffers_[i].address = slab_.address() + i * buffer_bytes;
  while (readers_.size() < std::max<std::size_t>(threads, 1)) {
    readers_.push_back(std::make_unique<TaskThread>(TaskThread::AtEnd::kDrop));
  }
  try {
    watcher_.submit([this] { watch_copies(); });
    for (const auto& reader : readers_) reader->submit([this] { run_reader(); });
  } catch (...) {
    close();
    throw;
  }
}

BufferRing::~BufferRing() {
  close();
}

void BufferRing::close() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  copying_.notify_all();
}

// ---- the consumer ------------------------------------------------------------------------------

void BufferRing::expect(const std::vector<PageIndex>& order) {
  std::vector<PageIndex> read;  // pages without reads would only be in the way
  std::copy_if(order.begin(), order.end(), std::back_inserter(read),
               [&](PageIndex page) { return !layouts_.at(page).reads.empty(); });
  {
    const std::lock_guard lock(mutex_);
    order_.set(layouts_.size(), read);
  }
  work_.notify_all();
}

bool BufferRing::ready(PageIndex page) {
  const std::lock_guard lock(mutex_);
  const Buffer* buffer = find(page);
  return buffer != nullptr && buffer->state == State::kFull;
}

std::byte* BufferRing::fetch(PageIndex page) {
  std::unique_lock lock(mutex_);
  order_.fetched(page);
  demand_error_ = nullptr;
  for (;;) {
    Buffer* buffer = find(page);
    if (buffer != nullptr && buffer->state == State::kFull) {
      ++buffer->users;
      buffer->used = ++fetches_;
      buffer->demanded = false;
      work_.notify_all();
      return buffer->address;
    }
    if (broken_) {
      demand_.reset();
      if (buffer != nullptr) buffer->demanded = false;
      std::rethrow_exception(broken_);
    }
    if (buffer != nullptr) {
      buffer->demanded = true;
    } else if (demand_error_) {
      std::rethrow_exception(std::exchange(demand_error_, nullptr));
    } else if (!demand_) {
      if (all_in_use()) {
        throw ScheduleError("page " + std::to_string(page) + " finds no buffer: all " +
                            std::to_string(buffers_.size()) +
                            " hold pages that are fetched and not released. Release them first, "
                            "or give the stream tier a larger ring");
      }
      demand_ = page;
      work_.notify_all();
    }
    arrived_.wait(lock);
  }
}

void BufferRing::release(PageIndex page, std::shared_ptr<OwnedEvent> copied) {
  const std::lock_guard lock(mutex_);
  Buffer* buffer = find(page);
  if (buffer == nullptr || buffer->users == 0) {
    throw ScheduleError("page " + std::to_string(page) + " is released, but is not fetched");
  }
  if (copied) {
    copies_.push_back({buffer, std::move(copied)});
    ++buffer->copies;
    copying_.notify_one();
  }
  --buffer->users;
  work_.notify_all();
}

bool BufferRing::all_in_use() const {
  return std::all_of(buffers_.begin(), buffers_.end(),
                     [](const Buffer& buffer) { return buffer.users > 0; });
}

// ---- copies ------------------------------------------------------------------------------------

void BufferRing::watch_copies() {
  std::vector<Copy> watched;
  std::unique_lock lock(mutex_);
  for (;;) {
    if (watched.empty()) copying_.wait(lock, [&] { return closing_ || !copies_.empty(); });
    if (closing_) return;
    std::move(copies_.begin(), copies_.end(), std::back_inserter(watched));
    copies_.clear();
    lock.unlock();
    const auto ended =
        std::partition(watched.begin(), watched.end(), [&](Copy& copy) { return !over(copy); });
    lock.lock();
    const bool some = ended != watched.end();
    std::for_each(ended, watched.end(), [](const Copy& copy) { --copy.buffer->copies; });
    lock.unlock();
    watched.erase(ended, watched.end());  // without the lock: events go back to the device
    lock.lock();
    if (some) {
      work_.notify_all();
    } else {
      copying_.wait_for(lock, kBetweenQuestions, [&] { return closing_; });
    }
  }
}

// Where the device cannot say whether a copy is over, time after time, its buffer must not be
// written again, ever: then all fetches that would wait end with that error.
bool BufferRing::over(Copy& copy) {
  try {
    return device_->event_done(copy.event->get());
  } catch (...) {
    if (++copy.failures == kMostFailures) {
      const std::lock_guard lock(mutex_);
      broken_ = std::current_exception();
      arrived_.notify_all();
    }
    return false;
  }
}

// ---- readers -----------------------------------------------------------------------------------

void BufferRing::run_reader() {
  std::unique_lock lock(mutex_);
  while (!closing_) {
    if (demand_ && start_page(lock)) continue;
    if (read_some(lock)) continue;
    if (start_page(lock)) continue;
    work_.wait(lock);
  }
}

BufferRing::Buffer* BufferRing::find(PageIndex page) {
  return buffer_of_.at(page);
}

// The first page of the order that is in no buffer.
std::optional<PageIndex> BufferRing::next_expected() const {
  for (StepTime ahead = 1; ahead <= order_.size(); ++ahead) {
    const PageIndex page = order_.page_at(order_.now() + ahead);
    if (buffer_of_[page] == nullptr && !failed_[page]) return page;
  }
  return std::nullopt;
}

// The buffer to be reused: an empty one, or else the one whose page is needed last, and later than
// the page that is to take its place; of pages that nobody expects, the one unused for longest.
BufferRing::Buffer* BufferRing::victim(StepTime needed_at) {
  Buffer* last = nullptr;
  StepTime last_use = needed_at;
  for (Buffer& buffer : buffers_) {
    if (!buffer.idle()) continue;
    if (buffer.state == State::kEmpty) return &buffer;
    const StepTime use = order_.next_use(buffer.page);
    const bool longer_unused = last != nullptr && use == last_use && buffer.used < last->used;
    if (use > last_use || longer_unused) {
      last = &buffer;
      last_use = use;
    }
  }
  return last;
}

// Gives a page a buffer, where there is one to be had. @return whether it did.
bool BufferRing::start_page(std::unique_lock<std::mutex>& lock) {
  const std::optional<PageIndex> page = demand_ ? demand_ : next_expected();
  if (!page) return false;
  Buffer* buffer = victim(demand_ ? 0 : order_.next_use(*page));
  if (buffer == nullptr) return false;
  if (buffer->state == State::kFull) buffer_of_[buffer->page] = nullptr;
  buffer_of_[*page] = buffer;
  buffer->state = State::kReading;
  buffer->page = *page;
  buffer->demanded = demand_.has_value();
  buffer->error = nullptr;
  buffer->next = 0;
  buffer->under_way = 0;
  demand_.reset();
  failed_[*page] = false;
  if (!buffer->registered) {
    buffer->under_way = 1;  // nobody may read into it, or take it away, meanwhile
    buffer->next = layouts_[*page].reads.size();
    lock.unlock();
    std::exception_ptr error;
    try {
      slab_.register_range(static_cast<std::size_t>(buffer->address - slab_.address()),
                           buffer_bytes_);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    buffer->under_way = 0;
    buffer->registered = error == nullptr;
    buffer->error = error;
    if (error) {
      finish(*buffer);
      return true;
    }
    buffer->next = 0;
  }
  work_.notify_all();
  return true;
}

// Does one read of the page that is needed first. @return whether there was one to do.
bool BufferRing::read_some(std::unique_lock<std::mutex>& lock) {
  Buffer* first = nullptr;
  const auto urgency = [&](const Buffer& buffer) {
    return buffer.demanded ? StepTime{0} : order_.next_use(buffer.page);
  };
  for (Buffer& buffer : buffers_) {
    if (buffer.state != State::kReading || buffer.next == layouts_[buffer.page].reads.size()) {
      continue;
    }
    if (first == nullptr || urgency(buffer) < urgency(*first)) first = &buffer;
  }
  if (first == nullptr) return false;
  const PageRead& read = layouts_[first->page].reads[first->next++];
  ++first->under_way;
  lock.unlock();
  std::exception_ptr error;
  try {
    source_.file(read.file).read(first->address + read.position, read.file_offset, read.needed,
                                 read.nbytes);
    read_bytes_ += read.needed;
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  --first->under_way;
  if (error) {
    first->error = error;
    first->next = layouts_[first->page].reads.size();
  }
  finish(*first);
  return true;
}

// Ends a page whose last read has ended.
void BufferRing::finish(Buffer& buffer) {
  if (buffer.under_way > 0 || buffer.next < layouts_[buffer.page].reads.size()) return;
  if (buffer.error) {
    buffer_of_[buffer.page] = nullptr;
    buffer.state = State::kEmpty;
    failed_[buffer.page] = true;
    if (buffer.demanded) demand_error_ = buffer.error;
    buffer.demanded = false;
    buffer.error = nullptr;
  } else {
    buffer.state = State::kFull;
  }
  work_.notify_all();  // whoever waits for a buffer may take this one
  arrived_.notify_all();
}

}  // namespace penstock
