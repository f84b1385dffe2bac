#include "host_tier/mapped_tier.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>

#include "error/error.hpp"
#include "error/format.hpp"
#include "host_tier/registrations.hpp"
#include "io/mapping.hpp"
#include "threading/time_limit.hpp"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace penstock {

namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A file's bytes as the page cache has them.
class FileMapping {
 public:
  explicit FileMapping(const File& file) : nbytes_(static_cast<std::size_t>(file.size())) {
    if (nbytes_ == 0) return;
    void* address = ::mmap(nullptr, nbytes_, PROT_READ, MAP_SHARED, file.descriptor(), 0);
    if (address == MAP_FAILED) {
      const int code = errno;
      throw DeviceError("mmap", code,
                        "cannot map " + file.path() + ": host=\"pinned\" does without");
    }
    address_ = static_cast<std::byte*>(address);
  }
  ~FileMapping() {
    if (address_ != nullptr) ::munmap(address_, nbytes_);
  }
  FileMapping(const FileMapping&) = delete;
  FileMapping& operator=(const FileMapping&) = delete;
  std::byte* address() const noexcept { return address_; }

 private:
  std::size_t nbytes_;
  std::byte* address_ = nullptr;
};

struct Range {
  std::size_t file;
  std::size_t start;  // whole system pages
  std::size_t end;
};

// The runs of needed bytes of each file, in whole system pages.
std::vector<Range> needed_ranges(const std::vector<Extent>& extents) {
  std::vector<Range> ranges;
  for (const Extent& extent : extents) {
    const auto start = static_cast<std::size_t>(extent.file_offset);
    ranges.push_back({extent.file, start / system_page() * system_page(),
                      round_up(start + extent.nbytes, system_page())});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
    return a.file != b.file ? a.file < b.file : a.start < b.start;
  });
  std::vector<Range> merged;
  for (const Range& range : ranges) {
    if (!merged.empty() && merged.back().file == range.file && range.start <= merged.back().end) {
      merged.back().end = std::max(merged.back().end, range.end);
    } else {
      merged.push_back(range);
    }
  }
  return merged;
}

}  // namespace

// The mapped files. As the target of a fill job it brings their bytes into the page cache.
class MappedTier::Mappings final : public FillTarget {
 public:
  Mappings(std::shared_ptr<Device> device, std::shared_ptr<const OpenSource> source,
           std::size_t nbytes)
      : source_(std::move(source)),
        nbytes_(nbytes),
        registrations_(std::make_unique<Registrations>(std::move(device))) {
    for (std::size_t i = 0; i < source_->file_count(); ++i) {
      files_.push_back(std::make_unique<FileMapping>(source_->file(i)));
    }
  }
  ~Mappings() override { registrations_.reset(); }  // while the memory is there
  Mappings(const Mappings&) = delete;
  Mappings& operator=(const Mappings&) = delete;

  const std::byte* address(const Extent& part) const {
    return files_[part.file]->address() + part.file_offset;
  }
  std::size_t registered_bytes() const { return registrations_->nbytes(); }
  void add(const Range& range) {
    registrations_->add(files_[range.file]->address() + range.start, range.end - range.start,
                        HostAccess::kReadOnly);
  }

  void check_range(std::size_t offset, std::size_t nbytes) const override {
    if (offset > nbytes_ || nbytes > nbytes_ - offset) {
      throw std::out_of_range("an extent leaves the host tier");
    }
  }

  void fill_from(const File& file, std::uint64_t file_offset, std::size_t offset,
                 std::size_t nbytes) override {
    const auto start = static_cast<std::size_t>(file_offset);
    const std::size_t skew = start % system_page();
    const std::size_t index = source_->parts(offset, nbytes).front().file;
    std::byte* first = files_[index]->address() + start - skew;
    ::madvise(first, nbytes + skew, MADV_WILLNEED);
    if (::madvise(first, nbytes + skew, MADV_POPULATE_READ) == 0) return;
    // Touching the mapping would end the process where the file has become shorter; reading tells.
    std::vector<std::byte> scratch(std::min(nbytes, kScratch));
    for (std::size_t done = 0; done < nbytes; done += scratch.size()) {
      file.read(scratch.data(), file_offset + done, std::min(scratch.size(), nbytes - done));
    }
  }

 private:
  static constexpr std::size_t kScratch = std::size_t{1} << 20;

  std::shared_ptr<const OpenSource> source_;
  std::size_t nbytes_;
  std::vector<std::unique_ptr<FileMapping>> files_;
  std::unique_ptr<Registrations> registrations_;
};

// What the registering thread uses. It has its own hold on it, and can outlive the tier.
struct MappedTier::Registering {
  std::shared_ptr<Mappings> mappings;
  std::vector<Range> ranges;
  FillJob warming;
  milliseconds limit;

  std::mutex mutex;
  std::condition_variable changed;
  std::optional<steady_clock::time_point> overdue;  // when the call under way takes too long
  bool stopped = false;
  bool given_up = false;
  bool registered = false;
  bool done = false;  // the thread is at its end
  std::exception_ptr error;

  Registering(std::shared_ptr<Mappings> mapped, const OpenSource& open, const Source& source,
              milliseconds call_limit, std::size_t threads)
      : mappings(std::move(mapped)),
        ranges(needed_ranges(open.extents())),
        warming(mappings, source.paths, open.extents(), threads, PageCache::kUse),
        limit(at_most_a_year(call_limit)) {}

  void run() {
    std::exception_ptr failure;
    bool all = false;
    try {
      all = warming.wait_for(milliseconds::max()) && register_ranges();
    } catch (const DeviceError& refused) {
      failure = std::make_exception_ptr(DeviceError(
          refused.call, refused.code,
          "this system does not register mappings of files: " + std::string(refused.what()) +
              ". Use host=\"pinned\""));
    } catch (...) {
      failure = std::current_exception();
    }
    const std::lock_guard lock(mutex);
    overdue.reset();
    registered = all;
    error = failure;
    done = true;
    changed.notify_all();
  }

  bool register_ranges() {
    for (const Range& range : ranges) {
      {
        const std::lock_guard lock(mutex);
        if (stopped) return false;
        overdue = steady_clock::now() + limit;
        changed.notify_all();
      }
      mappings->add(range);
    }
    return true;
  }

  /// Waits for the thread's end, up to `end`. @return whether that came; sets `given_up` where a
  /// call is past its limit.
  bool wait_until(std::unique_lock<std::mutex>& lock, steady_clock::time_point end) {
    while (!done && !given_up) {
      const auto now = steady_clock::now();
      if (overdue && now >= *overdue) {
        given_up = stopped = true;
        break;
      }
      if (now >= end) break;
      changed.wait_until(lock, overdue ? std::min(end, *overdue) : end);
    }
    return done && !given_up;
  }
};

MappedTier::MappedTier(std::shared_ptr<Device> device, std::size_t nbytes, std::size_t page_size,
                       const Source& source, milliseconds limit, std::size_t threads)
    : HostTier(nbytes, page_size),
      source_(std::make_shared<const OpenSource>(source, nbytes, PageCache::kUse)),
      overlay_(device),
      pages_(page_count()),
      known_(page_count()),
      mappings_(std::make_shared<Mappings>(std::move(device), source_, nbytes)),
      registering_(std::make_shared<Registering>(mappings_, *source_, source, limit,
                                                 threads > 0 ? threads : default_readers())),
      thread_([registering = registering_] { registering->run(); }) {}

MappedTier::~MappedTier() {
  if (!in_owner_process()) {
    thread_.detach();  // there is none
    static_cast<void>(std::make_unique<std::shared_ptr<Registering>>(registering_).release());
    return;
  }
  bool ended = false;
  {
    std::unique_lock lock(registering_->mutex);
    registering_->stopped = true;
    registering_->warming.cancel();
    registering_->wait_until(lock, steady_clock::now() + at_most_a_year(milliseconds::max()));
    ended = registering_->done;
  }
  if (ended) {
    thread_.join();
  } else {
    thread_.detach();
  }
}

void MappedTier::write(std::size_t offset, const void* source, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  source_->refuse_covered(offset, nbytes);
  overlay_.write(offset, static_cast<const std::byte*>(source), nbytes);
  for (std::size_t page = offset / page_size(); page * page_size() < offset + nbytes; ++page) {
    known_[page] = false;
  }
}

bool MappedTier::wait_for(milliseconds limit) {
  std::unique_lock lock(registering_->mutex);
  const bool done = registering_->wait_until(lock, steady_clock::now() + at_most_a_year(limit));
  if (registering_->given_up) {
    throw DeviceError("host_register", ETIMEDOUT,
                      "registering mapped files took longer than " +
                          std::to_string(registering_->limit.count()) +
                          " ms, and some systems never end it. Use host=\"pinned\"");
  }
  if (done && registering_->error) std::rethrow_exception(registering_->error);
  return done && registering_->registered;
}

std::size_t MappedTier::total_bytes() const noexcept {
  return registering_->warming.total_bytes();
}

std::size_t MappedTier::done_bytes() const noexcept {
  return registering_->warming.done_bytes();
}

bool MappedTier::ready(PageIndex page) {
  check_page(page);
  return wait_for(milliseconds(0)) && source_->is_unchanged(page * page_size(), bytes_of(page));
}

const std::vector<Piece>& MappedTier::fetch(PageIndex page) {
  check_page(page);
  source_->require_unchanged(page * page_size(), bytes_of(page));
  if (!wait_for(milliseconds(0))) {
    require_owner_process();
    wait_for(milliseconds::max());
  }
  if (!known_[page]) {
    pages_[page] = find_pieces(page);
    known_[page] = true;
  }
  return pages_[page];
}

std::vector<Piece> MappedTier::find_pieces(PageIndex page) const {
  const std::size_t start = page * page_size();
  std::vector<Piece> pieces;
  for (const Extent& part : source_->parts(start, bytes_of(page))) {
    pieces.push_back({mappings_->address(part), part.region_offset - start, part.nbytes,
                      &source_->file(part.file), part.file_offset});
  }
  return merge_pieces(std::move(pieces), overlay_.pieces(start, bytes_of(page)));
}

void MappedTier::read(std::size_t offset, void* target, std::size_t nbytes) {
  check_range(offset, nbytes);
  if (nbytes == 0) return;
  source_->read(offset, static_cast<std::byte*>(target), nbytes);
  overlay_.read(offset, static_cast<std::byte*>(target), nbytes);
}

void MappedTier::verify(PageIndex page, const std::byte* bytes) {
  sums_.verify(*source_, page * page_size(), bytes, bytes_of(page));
}

HostTierStats MappedTier::stats() const {
  HostTierStats stats;
  stats.pinned_bytes = overlay_.pinned_bytes();
  stats.mapped_bytes = mappings_->registered_bytes();
  stats.read_bytes = done_bytes();
  return stats;
}

}  // namespace penstock
