#include <pybind11/chrono.h>
#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "allocator/caching_allocator.hpp"
#include "bindings/bindings.hpp"
#include "torch_allocator/torch_allocator.hpp"

namespace py = pybind11;

namespace penstock {

namespace {

using PoolPair = std::pair<std::uint64_t, std::uint64_t>;

PoolId pool_id(const PoolPair& pool) {
  return {pool.first, pool.second};
}

// Addresses cross as integers.
std::uintptr_t number_of(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address);
}
void* address_of(std::uintptr_t number) {
  return reinterpret_cast<void*>(number);
}

// All figures by the names of torch.cuda.memory_stats.
std::map<std::string, std::uint64_t> stats(CachingAllocator& allocator) {
  static constexpr const char* kSides[] = {"small_pool", "large_pool", "all"};
  const AllocatorStats figures = allocator.stats();
  std::map<std::string, std::uint64_t> named;
  for (std::size_t i = 0; i < kSideCount; ++i) {
    AllocatorStats::for_each(figures.sides[i], [&](const char* name, const Stat& stat) {
      const std::string prefix = std::string(name) + "." + kSides[i] + ".";
      named[prefix + "current"] = static_cast<std::uint64_t>(stat.current);
      named[prefix + "peak"] = static_cast<std::uint64_t>(stat.peak);
      named[prefix + "allocated"] = static_cast<std::uint64_t>(stat.allocated);
      named[prefix + "freed"] = static_cast<std::uint64_t>(stat.freed);
    });
  }
  named["num_alloc_retries"] = figures.num_alloc_retries;
  named["num_ooms"] = figures.num_ooms;
  named["num_device_alloc"] = figures.num_device_alloc;
  named["num_device_free"] = figures.num_device_free;
  return named;
}

void begin_pool(CachingAllocator& allocator, const PoolPair& pool,
                std::optional<std::vector<std::uintptr_t>> streams) {
  allocator.begin_pool(pool_id(pool), [streams = std::move(streams)](StreamHandle stream) {
    if (!streams) return true;
    return std::find(streams->begin(), streams->end(), number_of(stream.value)) != streams->end();
  });
}

}  // namespace

void bind_allocator(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> without_gil;

  py::class_<LiveBlock>(module, "LiveBlock", "A block that somebody has.")
      .def_property_readonly("address",
                             [](const LiveBlock& block) { return number_of(block.address); })
      .def_readonly("nbytes", &LiveBlock::nbytes)
      .def_readonly("requested", &LiveBlock::requested)
      .def_property_readonly("stream",
                             [](const LiveBlock& block) { return number_of(block.stream.value); })
      .def_readonly("sequence", &LiveBlock::sequence)
      .def_property_readonly("pool", [](const LiveBlock& block) {
        return PoolPair(block.pool.first, block.pool.second);
      });

  py::native_enum<PressureKind>(module, "PressureKind", "enum.Enum", "What memory was short for.")
      .value("near", PressureKind::kNear)
      .value("made_room", PressureKind::kMadeRoom)
      .value("refused", PressureKind::kRefused)
      .finalize();

  py::class_<PressureEvent>(module, "PressureEvent", "Memory was short; sizes in bytes.")
      .def_readonly("kind", &PressureEvent::kind)
      .def_readonly("asked", &PressureEvent::asked)
      .def_readonly("cap", &PressureEvent::cap)
      .def_readonly("used", &PressureEvent::used)
      .def_readonly("available", &PressureEvent::available)
      .def_readonly("given", &PressureEvent::given);

  py::class_<OverflowStats>(module, "OverflowStats", "Host memory in tensors' place; in bytes.")
      .def_readonly("limit", &OverflowStats::limit)
      .def_readonly("live", &OverflowStats::live)
      .def_readonly("peak", &OverflowStats::peak)
      .def_readonly("held", &OverflowStats::held);

  py::class_<CachingAllocator, std::shared_ptr<CachingAllocator>>(
      module, "CachingAllocator",
      "Gives out device memory of frames under the cap, in the order of streams. Thread-safe.")
      .def(py::init([](std::shared_ptr<FramePool> pool, std::size_t small, std::size_t large) {
             return CachingAllocator::create(std::move(pool), {small, large});
           }),
           py::arg("pool"), py::arg("small_arena_bytes") = 0, py::arg("large_arena_bytes") = 0)
      .def(
          "allocate",
          [](CachingAllocator& allocator, std::size_t nbytes, std::uintptr_t stream) {
            return number_of(allocator.allocate(nbytes, stream_of(stream)));
          },
          py::arg("nbytes"), py::arg("stream") = 0, without_gil,
          "Return the address of memory for work of a stream; 0 for no bytes.")
      .def(
          "free",
          [](CachingAllocator& allocator, std::uintptr_t address) {
            allocator.free(address_of(address));
          },
          py::arg("address"), without_gil, "Take a block back.")
      .def(
          "record_stream",
          [](CachingAllocator& allocator, std::uintptr_t address, std::uintptr_t stream) {
            allocator.record_stream(address_of(address), stream_of(stream));
          },
          py::arg("address"), py::arg("stream"), without_gil,
          "Say that work of another stream uses the block too.")
      .def("empty_cache", &CachingAllocator::empty_cache, without_gil,
           "Give back all frames on which no block lies; return the bytes.")
      .def("give_back", &CachingAllocator::give_back, py::arg("nbytes"), without_gil,
           "Give back so many bytes of such frames, if there are; return the bytes.")
      .def("begin_pool", &begin_pool, py::arg("pool"), py::arg("streams") = py::none(), without_gil,
           "Serve requests on these streams, or on all, from a private pool.")
      .def(
          "end_pool",
          [](CachingAllocator& allocator, const PoolPair& pool) {
            allocator.end_pool(pool_id(pool));
          },
          py::arg("pool"), without_gil, "Serve requests from the common pool again.")
      .def(
          "release_pool",
          [](CachingAllocator& allocator, const PoolPair& pool) {
            allocator.release_pool(pool_id(pool));
          },
          py::arg("pool"), without_gil, "Let go of a pool that was begun.")
      .def(
          "set_overflow_limit",
          [](CachingAllocator& allocator, std::size_t nbytes) {
            allocator.overflow().set_limit(nbytes);
          },
          py::arg("nbytes"), "Let large requests take so much of the host's memory; 0: none.")
      .def(
          "overflow_stats",
          [](CachingAllocator& allocator) { return allocator.overflow().stats(); },
          "Read how much of it they have.")
      .def("take_idle_bytes", &CachingAllocator::take_idle_bytes, without_gil,
           "Return bytes of frames that nothing has needed since the last call.")
      .def_property_readonly("peak_active_bytes", &CachingAllocator::peak_active_bytes,
                             "The most bytes that blocks have taken.")
      .def("stats", &stats, without_gil, "Read the figures of torch.cuda.memory_stats.")
      .def("reset_peak_stats", &CachingAllocator::reset_peak_stats, without_gil)
      .def("reset_accumulated_stats", &CachingAllocator::reset_accumulated_stats, without_gil)
      .def(
          "listen_for_pressure",
          [](CachingAllocator& allocator, bool listening) {
            allocator.pressure().set_listening(listening);
          },
          py::arg("listening"), "Say whether events are to be kept for take_pressure.")
      .def(
          "take_pressure",
          [](CachingAllocator& allocator, std::chrono::milliseconds limit) {
            return allocator.pressure().take(limit);
          },
          py::arg("limit"), without_gil,
          "Take the events so far, waiting for one up to a time limit.")
      .def(
          "wake_listener", [](CachingAllocator& allocator) { allocator.pressure().wake(); },
          "Have take_pressure return.")
      .def_property_readonly(
          "dropped_events",
          [](CachingAllocator& allocator) { return allocator.pressure().dropped(); },
          "Events for which there was no room.")
      .def_property_readonly(
          "given_bytes",
          [](CachingAllocator& allocator) { return allocator.pressure().given_bytes(); },
          "Bytes that others gave for requests.")
      .def("live_blocks", &CachingAllocator::live_blocks, without_gil,
           "List the blocks that somebody has, the oldest first.");

  module.def("install_torch_allocator", &torch_allocator::install, py::arg("ordinal"),
             py::arg("allocator"), without_gil,
             "Make an allocator serve the functions that torch calls for a device.");
  module.def("uninstall_torch_allocator", &torch_allocator::uninstall, py::arg("ordinal"),
             without_gil, "Take it back, where none of its blocks is in use.");
  module.def("installed_torch_allocator", &torch_allocator::installed, py::arg("ordinal"),
             "Return the allocator that serves a device, if any.");
  module.def(
      "set_torch_thrower",
      [](std::uintptr_t function) {
        torch_allocator::set_thrower(reinterpret_cast<torch_allocator::Thrower>(function));
      },
      py::arg("function"),
      "Set the address of what throws when memory runs out: void (*)(const char*); 0 for none.");
}

}  // namespace penstock
