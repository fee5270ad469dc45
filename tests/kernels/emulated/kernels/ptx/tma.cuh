#pragma once
#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {
inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void fence_async_proxy() {}
inline void prefetch_l2(const void*) {}
inline void tma_prefetch_5d(const CUtensorMap*, int, int, int, int, int) {}

inline void complete(std::uint64_t* barrier, std::uint32_t bytes) {
  auto& x = Block::current().barrier(barrier);
  x.bytes -= bytes;
  Block::settle(x);
}

inline void bulk_load(void* smem, const void* global, std::uint32_t bytes, std::uint64_t* barrier) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0 || smem_address(smem) % 16 != 0 || bytes % 16 != 0)
    throw std::logic_error("a bulk copy that is not aligned");
  Block::current().shared_at(smem_address(smem), bytes);
  Block::current().later([=] {
    std::memcpy(smem, global, bytes);
    complete(barrier, bytes);
  });
}

/// Boxes of 128 bytes of rows, from column c0 of 16 bits on; what lies outside is zero.
inline void tma_load_5d(void* smem, const CUtensorMap* map, std::uint64_t* barrier, int c0, int c1, int c2,
                        int c3, int c4) {
  const int at[5] = {c0, c1, c2, c3, c4};
  Block::current().later([=, m = *map, start = std::to_array(at)] {
    std::uint32_t row = 0;
    for (int i3 = 0; i3 < m.box[3]; ++i3) {
      for (int i2 = 0; i2 < m.box[2]; ++i2) {
        for (int i1 = 0; i1 < m.box[1]; ++i1, ++row) {
          const std::int64_t i[5] = {0, start[1] + i1, start[2] + i2, start[3] + i3, start[4]};
          const std::byte* from = m.data + std::int64_t{start[0]} * 2;
          bool inside = true;
          for (int d = 1; d < 5; ++d) {
            from += i[d] * m.stride[d];
            inside &= i[d] >= 0 && i[d] < m.size[d];
          }
          for (std::uint32_t word = 0; word < 8; ++word) {
            std::byte* const to = static_cast<std::byte*>(smem) + row * 128 + ((word ^ row % 8) * 16);
            if (inside && start[0] + 8 * static_cast<int>(word) < m.size[0]) {
              std::memcpy(to, from + word * 16, 16);
            } else {
              std::memset(to, 0, 16);
            }
          }
        }
      }
    }
    complete(barrier, row * 128);
  });
}
}  // namespace flash_mla::sm90::ptx
