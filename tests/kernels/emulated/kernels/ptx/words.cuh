#pragma once
#include "base/fp8.h"
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {
template <class T>
T load_shared(std::uint32_t from) {
  if (from % sizeof(T) != 0) throw std::logic_error("a load from shared memory that is not aligned");
  T x;
  std::memcpy(&x, Block::current().shared_at(from, sizeof(T)), sizeof(T));
  return x;
}
inline std::uint32_t load_shared_2(std::uint32_t from) {
  if (from % 2 != 0) throw std::logic_error("a load from shared memory that is not aligned");
  std::uint16_t x;
  std::memcpy(&x, Block::current().shared_at(from, 2), 2);
  return x;
}
inline void store_shared_4(std::uint32_t to, std::uint32_t x) {
  std::memcpy(Block::current().shared_at(to, 4), &x, 4);
}
inline void store_shared_16(std::uint32_t to, uint4 x) {
  std::memcpy(Block::current().shared_at(to, 16), &x, 16);
}
inline std::uint32_t widen_e4m3(std::uint16_t x) {
  const __half2 h = __floats2half2_rn(to_float(E4m3{static_cast<std::uint8_t>(x)}),
                                      to_float(E4m3{static_cast<std::uint8_t>(x >> 8)}));
  std::uint32_t bits;
  std::memcpy(&bits, &h, 4);
  return bits;
}
inline std::uint32_t and_or(std::uint32_t x, std::uint32_t mask, std::uint32_t bits) { return (x & mask) | bits; }

}  // namespace flash_mla::sm90::ptx
