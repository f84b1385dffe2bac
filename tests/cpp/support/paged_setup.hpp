// A paged model over a region of frames, and operations on it that look at their bytes.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "paging/paged_model.hpp"
#include "support/frames_setup.hpp"

namespace penstock::testing {

// Their addresses tell operations apart.
inline constexpr char kMm[] = "aten::mm";
inline constexpr char kAdd[] = "aten::add";
inline constexpr char kCopy[] = "aten::copy_";

inline PagingOperation operation(const char* name, StreamHandle stream = kCaller,
                                 bool in_backward = false) {
  return {name, name, stream.value, in_backward};
}

/// A tensor for each page: w0, w1, ...
inline std::vector<TensorPlace> tensor_per_page(std::size_t page_count) {
  std::vector<TensorPlace> tensors;
  for (std::size_t page = 0; page < page_count; ++page) {
    tensors.push_back({page * kPage, kPage, kPage, "w" + std::to_string(page)});
  }
  return tensors;
}

struct PagedSetup : FramesSetup {
  PagedSetup(std::size_t cap_pages, std::size_t page_count, std::vector<TensorPlace> tensors = {})
      : FramesSetup(cap_pages, page_count),
        streamer(std::make_shared<Streamer>(region)),
        model(std::make_shared<PagedModel>(
            "llm", streamer, region,
            tensors.empty() ? tensor_per_page(page_count) : std::move(tensors))) {}

  PagingRange range(std::size_t offset, std::size_t nbytes, bool written = false) const {
    return {region->address() + offset, nbytes, written};
  }
  std::vector<PagingRange> ranges(const Pages& pages, bool written = false) const {
    std::vector<PagingRange> found;
    for (const PageIndex page : pages) found.push_back(range(page * kPage, kPage, written));
    return found;
  }

  StepId run(const PagingOperation& what, const std::vector<PagingRange>& all) {
    const PagedModel::Hold hold = model->begin(what, all.data(), all.size());
    for (const PageIndex page : model->pages(hold.step)) {
      EXPECT_TRUE(what.stream != nullptr || right_now(*region, bytes, page)) << page;
    }
    model->end(hold, what, all.data(), all.size());
    return hold.step;
  }
  StepId run(const PagingOperation& what, const Pages& pages) { return run(what, ranges(pages)); }
  /// Has pages held without an operation.
  PagedModel::Hold hold(const std::string& what, const Pages& pages) {
    const PagingOperation kernel{this, what.c_str(), kCaller.value, false};
    const auto held = ranges(pages);
    return model->begin(kernel, held.data(), held.size());
  }
  /// mm of each page.
  std::vector<StepId> run_each(const Pages& pages) {
    std::vector<StepId> steps;
    for (const PageIndex page : pages) steps.push_back(run(operation(kMm), Pages{page}));
    return steps;
  }
  /// A call of the model that does so.
  std::vector<StepId> call(const Pages& pages, bool complete = true) {
    model->begin_call();
    const std::vector<StepId> steps = run_each(pages);
    model->end_call(kCaller, false, complete);
    return steps;
  }
  /// Writes to the first bytes of a page, on the calling thread.
  void write(PageIndex page, std::uint8_t value) {
    const std::vector<PagingRange> all = {range(page * kPage, 100, true)};
    const PagedModel::Hold hold = model->begin(operation(kCopy), all.data(), 1);
    std::memset(region->address() + page * kPage, value, 100);
    model->end(hold, operation(kCopy), all.data(), 1);
    std::memset(bytes.data() + page * kPage, value, 100);
  }
  /// Pages loaded and steps that missed since this was last asked.
  std::pair<std::uint64_t, std::uint64_t> since() {
    const StreamerStats now = streamer->stats();
    const std::pair found{(now.loaded_bytes - before.loaded_bytes) / kPage,
                          now.misses - before.misses};
    before = now;
    return found;
  }

  std::shared_ptr<Streamer> streamer;
  std::shared_ptr<PagedModel> model;
  StreamerStats before;
};

}  // namespace penstock::testing
