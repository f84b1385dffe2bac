// Owners of a device's handles. Each keeps the device alive and gives its handle back when it goes;
// a failure then is recorded with the device (Device::suppress), since destructors cannot throw.
#pragma once

#include <cstddef>
#include <memory>

#include "device/device.hpp"

namespace penstock {

class OwnedStream {
 public:
  explicit OwnedStream(std::shared_ptr<Device> device);
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  StreamHandle get() const noexcept { return handle_; }

 private:
  std::shared_ptr<Device> device_;
  StreamHandle handle_;
};

class OwnedEvent {
 public:
  explicit OwnedEvent(std::shared_ptr<Device> device, Timing timing = Timing::kOff);
  ~OwnedEvent();
  OwnedEvent(const OwnedEvent&) = delete;
  OwnedEvent& operator=(const OwnedEvent&) = delete;
  EventHandle get() const noexcept { return handle_; }

 private:
  std::shared_ptr<Device> device_;
  EventHandle handle_;
};

/// A reserved range of managed memory.
class ManagedRange {
 public:
  ManagedRange(std::shared_ptr<Device> device, std::size_t nbytes, Access access);
  ~ManagedRange();
  ManagedRange(const ManagedRange&) = delete;
  ManagedRange& operator=(const ManagedRange&) = delete;
  std::byte* address() const noexcept { return address_; }
  std::size_t nbytes() const noexcept { return nbytes_; }
  Access access() const noexcept { return access_; }

 private:
  std::shared_ptr<Device> device_;
  std::size_t nbytes_;
  Access access_;
  std::byte* address_;
};

/// A reserved range of addresses without memory.
class AddressRange {
 public:
  AddressRange(std::shared_ptr<Device> device, std::size_t nbytes);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  std::byte* address() const noexcept { return address_; }

 private:
  std::shared_ptr<Device> device_;
  std::size_t nbytes_;
  std::byte* address_;
};

/// Lets the calling thread's calls through while a stream captures, for as long as it lives: for
/// calls that touch no stream that captures.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(Device& device)
      : device_(device), before_(device.exchange_capture_mode(CaptureMode::kRelaxed)) {}
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  Device& device_;
  CaptureMode before_;
};

}  // namespace penstock
