#include "device/handles.hpp"

#include <exception>
#include <utility>

namespace penstock {

namespace {

template <typename Release>
void release_quietly(Device& device, Release release) noexcept {
  try {
    release();
  } catch (const std::exception& error) {
    device.suppress(error.what());
  }
}

}  // namespace

void Device::suppress(const std::string& what) noexcept {
  ++suppressed_count_;
  try {
    const std::lock_guard lock(suppressed_mutex_);
    last_suppressed_ = what;
  } catch (...) {  // out of memory for the text: the count still tells
  }
}

std::string Device::last_suppressed() const {
  const std::lock_guard lock(suppressed_mutex_);
  return last_suppressed_;
}

OwnedStream::OwnedStream(std::shared_ptr<Device> device)
    : device_(std::move(device)), handle_(device_->stream_create()) {}
OwnedStream::~OwnedStream() {
  release_quietly(*device_, [&] { device_->stream_destroy(handle_); });
}

OwnedEvent::OwnedEvent(std::shared_ptr<Device> device, Timing timing)
    : device_(std::move(device)), handle_(device_->event_create(timing)) {}
OwnedEvent::~OwnedEvent() {
  release_quietly(*device_, [&] { device_->event_destroy(handle_); });
}

ManagedRange::ManagedRange(std::shared_ptr<Device> device, std::size_t nbytes, Access access)
    : device_(std::move(device)),
      nbytes_(nbytes),
      access_(access),
      address_(static_cast<std::byte*>(device_->managed_reserve(nbytes, access))) {}
ManagedRange::~ManagedRange() {
  release_quietly(*device_, [&] { device_->managed_release(address_, nbytes_); });
}

AddressRange::AddressRange(std::shared_ptr<Device> device, std::size_t nbytes)
    : device_(std::move(device)),
      nbytes_(nbytes),
      address_(static_cast<std::byte*>(device_->address_reserve(nbytes))) {}
AddressRange::~AddressRange() {
  release_quietly(*device_, [&] { device_->address_release(address_, nbytes_); });
}

RelaxedCapture::~RelaxedCapture() {
  release_quietly(device_, [&] { device_.exchange_capture_mode(before_); });
}

}  // namespace penstock
