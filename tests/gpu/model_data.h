#pragma once

// Random matrices on the host and the device, for the tests of the model's kernels.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "device.h"

namespace flash_mla::gpu_test {

/// bfloat16 bits, rounded to nearest, ties to even.
inline std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

/// Quick rather than good: normal numbers come from a table that is drawn once.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1), table_(1 << 16) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<float> normal_distribution;
    for (float& x : table_) x = normal_distribution(generator);
  }
  float normal() { return table_[next() >> 48]; }
  int below(int n) { return static_cast<int>((next() >> 33) % static_cast<std::uint64_t>(n)); }
  bool coin() { return below(2) != 0; }
  std::vector<std::uint16_t> bf16(std::size_t n, float scale) {
    std::vector<std::uint16_t> v(n);
    for (auto& x : v) x = to_bf16(normal() * scale);
    return v;
  }
  std::vector<float> fp32(std::size_t n, float scale) {
    std::vector<float> v(n);
    for (auto& x : v) x = normal() * scale + normal() * 1e-3f * scale;
    return v;
  }

 private:
  std::uint64_t next() { return state_ = state_ * 6364136223846793005ull + 1442695040888963407ull; }

  std::uint64_t state_;
  std::vector<float> table_;
};

/// A device copy of a host vector, `shift` bytes past an aligned address.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& host, std::size_t shift = 0)
      : memory_(host.size() * sizeof(T) + shift), shift_(shift), size_(host.size()) {
    upload(host);
  }
  /// Poisoned.
  explicit OnDevice(std::size_t size) : memory_(size * sizeof(T)), shift_(0), size_(size) {
    memory_.poison();
  }

  T* get() const { return reinterpret_cast<T*>(memory_.as<std::byte>() + shift_); }
  void upload(const std::vector<T>& host) {
    check(cudaMemcpy(get(), host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void poison() { memory_.poison(); }
  std::vector<T> host() const {
    std::vector<T> v(size_);
    check(cudaMemcpy(v.data(), get(), size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return v;
  }

 private:
  DeviceMemory memory_;
  std::size_t shift_, size_;
};

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

}  // namespace flash_mla::gpu_test
