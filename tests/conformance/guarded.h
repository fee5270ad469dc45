#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "backend.h"

namespace flash_mla::conformance {

/// Memory of a backend with guard bytes on both sides.
class Guarded {
 public:
  static constexpr std::size_t kGuard = 256;
  static constexpr std::uint8_t kGuardByte = 0xA5;

  Guarded(BackendUnderTest& backend, std::size_t bytes) : backend_(backend), bytes_(bytes) {
    memory_ = static_cast<std::uint8_t*>(backend.allocate(bytes + 2 * kGuard));
    const std::vector<std::uint8_t> fill(bytes + 2 * kGuard, kGuardByte);
    backend.upload(memory_, fill.data(), fill.size());
  }
  ~Guarded() { backend_.release(memory_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return memory_ + kGuard; }
  void upload(const void* from) { backend_.upload(data(), from, bytes_); }
  std::vector<std::uint8_t> download() const {
    std::vector<std::uint8_t> v(bytes_ + 2 * kGuard);
    backend_.download(v.data(), memory_, v.size());
    for (std::size_t i = 0; i < kGuard; ++i) {
      if (v[i] != kGuardByte || v[bytes_ + kGuard + i] != kGuardByte) {
        throw std::runtime_error("memory outside a buffer was written");
      }
    }
    return {v.begin() + kGuard, v.end() - kGuard};
  }

 private:
  BackendUnderTest& backend_;
  std::size_t bytes_;
  std::uint8_t* memory_;
};

}  // namespace flash_mla::conformance
