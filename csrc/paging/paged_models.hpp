// All paged models of the process, by where their regions lie: what the functions of the paging API
// look up. An operation may touch several of them, and operations nest; what a thread holds by the
// operations around it is not begun again.
//
// A forked child has the addresses of its parent's models, and on the host the memory itself: it
// may neither read nor write them, since the parent goes on changing both. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "paging/paged_model.hpp"
#include "paging/paging_api.hpp"

namespace penstock {

/// What one operation holds.
class HeldOperation;

class PagedModels {
 public:
  static PagedModels& get();

  /// Makes a model known, for as long as it lives.
  void add(const std::shared_ptr<PagedModel>& model);

  /// See PagingApi; both throw. @return null where nothing is held.
  HeldOperation* begin(const PagingOperation& operation, const PagingRange* ranges,
                       std::size_t count);
  static void end(HeldOperation* held);
  bool begin_at_once(const PagingOperation& operation, const PagingRange* ranges, std::size_t count,
                     HeldOperation** held);
  static bool end_at_once(HeldOperation* held);
  /// The same for a function of the user's that reads offsets and sizes of a model's region,
  /// without operations. @param what  For messages.
  HeldOperation* begin_kernel(const PagedModel& model, const std::string& what,
                              const std::vector<std::pair<std::size_t, std::size_t>>& ranges,
                              StreamHandle stream);
  std::size_t part_bytes(const PagingRange* ranges, std::size_t count) const;
  std::uint64_t hold_address(const PagingOperation& operation, const PagingRange& range,
                             std::uint64_t scope, bool patient);
  /// Lets go of the addresses that this thread has taken.
  static void release_addresses();
  /// Lets go of those whose scope is not open. @return whether there were any; see AddressHolds.
  static bool release_ended_addresses(const std::vector<std::uint64_t>& open);

 private:
  struct Known {
    const std::byte* begin;
    const std::byte* end;
    std::weak_ptr<PagedModel> model;
    unsigned generation;  // of forks, in which it was made
  };

  PagedModels();
  /// The model on whose region an address is; null for none.
  /// @throws ModelError for one of the process that this one was forked from.
  std::shared_ptr<PagedModel> find(const void* address) const;

  // Replaced in a forked child, where nobody would unlock it; never deleted.
  std::shared_mutex* mutex_ = new std::shared_mutex;
  std::vector<Known> known_;  // ascending by address
};

}  // namespace penstock
