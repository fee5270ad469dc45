#pragma once

// wgmma on e4m3 as in wgmma_e4m3.cuh, of 64 x 128 and, with A in registers, of 64 x 16 sums.

#include <cstdint>

#include "kernels/ptx/wgmma_e4m3.cuh"

namespace flash_mla::sm90::ptx {

// clang-format off
#define FLASH_MLA_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
/// d (+)= A B^T of 32 bytes of each row of A and B.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], std::uint64_t a, std::uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1;\n}\n"
      : FLASH_MLA_SUMS_8(0), FLASH_MLA_SUMS_8(8), FLASH_MLA_SUMS_8(16), FLASH_MLA_SUMS_8(24),
        FLASH_MLA_SUMS_8(32), FLASH_MLA_SUMS_8(40), FLASH_MLA_SUMS_8(48), FLASH_MLA_SUMS_8(56)
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
/// The same with A in registers.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], const std::uint32_t (&a)[4], std::uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1;\n}\n"
      : FLASH_MLA_SUMS_8(0), FLASH_MLA_SUMS_8(8), FLASH_MLA_SUMS_8(16), FLASH_MLA_SUMS_8(24),
        FLASH_MLA_SUMS_8(32), FLASH_MLA_SUMS_8(40), FLASH_MLA_SUMS_8(48), FLASH_MLA_SUMS_8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
/// The same, and 64 x 16 sums.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[8], const std::uint32_t (&a)[4], std::uint64_t b,
                                           bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1;\n}\n"
      : FLASH_MLA_SUMS_8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef FLASH_MLA_SUMS_8
// clang-format on

}  // namespace flash_mla::sm90::ptx
