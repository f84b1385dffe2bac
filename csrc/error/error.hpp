// The errors of Penstock. Every failure that a caller can act on is one of these types; each
// carries its figures as members and a complete message (what was asked for, the numbers, the
// remedy). They cross into Python as the classes of the same name in penstock.errors. Wrong
// arguments are std::invalid_argument and std::out_of_range, as everywhere in C++.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace penstock {

/// Base of all errors of the project.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A request that does not fit under the cap, also after evicting all that may be evicted.
class CapExceededError : public Error {
 public:
  CapExceededError(const std::string& message, std::size_t requested_bytes, std::size_t cap_bytes,
                   std::size_t used_bytes)
      : Error(message), requested(requested_bytes), cap(cap_bytes), used(used_bytes) {}
  std::size_t requested;  ///< Bytes asked for.
  std::size_t cap;        ///< Bytes the budget may hand out.
  std::size_t used;       ///< Bytes handed out when the request was refused.
};

/// A call of the device (CUDA, or the operating system on the host device) that failed.
class DeviceError : public Error {
 public:
  /// @param detail  What the device said, for people.
  DeviceError(const std::string& call_name, int error_code, const std::string& detail);
  std::string call;  ///< Name of the call, such as "cudaMemPrefetchAsync" or "mmap".
  int code;          ///< The call's own error code (cudaError_t, CUresult or errno).
};

/// Checkpoint bytes that cannot be read.
class CheckpointError : public Error {
 public:
  CheckpointError(const std::string& message, std::string file, std::uint64_t file_offset,
                  std::string tensor_name = "")
      : Error(message),
        path(std::move(file)),
        offset(file_offset),
        tensor(std::move(tensor_name)) {}
  std::string path;      ///< The file.
  std::uint64_t offset;  ///< Byte offset in the file at which reading failed.
  std::string tensor;    ///< A tensor that was to be read; empty where that is not known.
};

/// A step or a page used against the schedule or the page table's rules.
class ScheduleError : public Error {
 public:
  using Error::Error;
};

/// A model that cannot be used as it was.
class ModelError : public Error {
 public:
  using Error::Error;
};

/// Builds a DeviceError for a failed system call from errno.
DeviceError system_error(const std::string& call, int saved_errno);

}  // namespace penstock
