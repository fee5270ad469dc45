#pragma once

// wgmma: asynchronous matrix products of a warpgroup (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions"). Accumulators fp32, operands bf16 or fp16 (kBf16). Kernels see them through tile.cuh, as
// products of tiles.

#include <cstdint>

#include "kernels/ptx/mbarrier.cuh"

namespace flash_mla::sm90::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Waits until at most kPending of the committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Matrix descriptor of a tile in shared memory made of 128-byte-swizzled atoms of 8 rows x 128 bytes.
/// `leading` and `stride` are byte offsets between atoms: K-major operands (rows along M or N, contiguous along
/// K) use only `stride`, from one group of 8 rows to the next; MN-major ones use `leading` from one group of 64
/// columns to the next and `stride` from one group of 8 k to the next.
__device__ __forceinline__ std::uint64_t swizzled_descriptor(const void* smem, std::uint32_t leading,
                                                             std::uint32_t stride) {
  constexpr std::uint64_t kSwizzle128 = 1ull << 62;
  std::uint32_t address = (smem_address(smem) & 0x3FFFF) >> 4;
  // Opaque to the compiler: it would compute every descriptor of an unrolled loop ahead and keep them in registers.
  asm volatile("" : "+r"(address));
  return kSwizzle128 | static_cast<std::uint64_t>(address) |
         static_cast<std::uint64_t>(leading >> 4) << 16 | static_cast<std::uint64_t>(stride >> 4) << 32;
}

/// The descriptor of a tile `units` times 16 bytes further on. In 32 bits, so that the upper half stays a constant.
__device__ __forceinline__ std::uint64_t advance(std::uint64_t descriptor, std::uint32_t units) {
  return (descriptor & 0xFFFFFFFF00000000ull) | (static_cast<std::uint32_t>(descriptor) + units);
}

// clang-format off

// The accumulators of a product m64nNk16, N / 2 to a thread: in the assembler's text and as operands.
#define FLASH_MLA_WGMMA_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASH_MLA_WGMMA_TEXT_16 FLASH_MLA_WGMMA_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH_MLA_WGMMA_TEXT_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_MLA_WGMMA_TEXT_64 FLASH_MLA_WGMMA_TEXT_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_MLA_WGMMA_TEXT_128 FLASH_MLA_WGMMA_TEXT_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASH_MLA_WGMMA_SUMS_8_AT(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLASH_MLA_WGMMA_SUMS_32_AT(i) \
  FLASH_MLA_WGMMA_SUMS_8_AT(i), FLASH_MLA_WGMMA_SUMS_8_AT(i + 8), FLASH_MLA_WGMMA_SUMS_8_AT(i + 16), FLASH_MLA_WGMMA_SUMS_8_AT(i + 24)
#define FLASH_MLA_WGMMA_SUMS_8 FLASH_MLA_WGMMA_SUMS_8_AT(0)
#define FLASH_MLA_WGMMA_SUMS_16 FLASH_MLA_WGMMA_SUMS_8_AT(0), FLASH_MLA_WGMMA_SUMS_8_AT(8)
#define FLASH_MLA_WGMMA_SUMS_32 FLASH_MLA_WGMMA_SUMS_32_AT(0)
#define FLASH_MLA_WGMMA_SUMS_64 FLASH_MLA_WGMMA_SUMS_32, FLASH_MLA_WGMMA_SUMS_32_AT(32)
#define FLASH_MLA_WGMMA_SUMS_128 FLASH_MLA_WGMMA_SUMS_64, FLASH_MLA_WGMMA_SUMS_32_AT(64), FLASH_MLA_WGMMA_SUMS_32_AT(96)

// factors, predicate, major: the operands behind the accumulators in the text; last the factors themselves.
#define FLASH_MLA_WGMMA(n, type, sums, factors, predicate, major, ...)                             \
  asm volatile(                                                                                    \
      "{\n.reg .pred p;\nsetp.ne.b32 p, " predicate ", 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " "                          \
      "{" FLASH_MLA_WGMMA_TEXT_##sums "}, " factors ", p, 1, 1, " major ";\n}\n"                   \
      : FLASH_MLA_WGMMA_SUMS_##sums                                                                \
      : __VA_ARGS__, "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMnMajor)))
#define FLASH_MLA_WGMMA_EITHER(n, ...)              \
  if constexpr (kBf16) {                            \
    FLASH_MLA_WGMMA(n, "bf16", __VA_ARGS__);        \
  } else {                                          \
    FLASH_MLA_WGMMA(n, "f16", __VA_ARGS__);         \
  }

/// d (+)= A B, 64 x 16 times 16 x 2 kSums. A and B in shared memory, A K-major, B K-major or MN-major.
template <bool kBf16, bool kMnMajor, int kSums>
__device__ __forceinline__ void wgmma_ss(float (&d)[kSums], std::uint64_t a, std::uint64_t b, bool accumulate) {
  static_assert(kSums == 32 || kSums == 64 || kSums == 128);
  if constexpr (kSums == 32) {
    FLASH_MLA_WGMMA_EITHER(64, 32, "%32, %33", "%34", "0, %35", "l"(a), "l"(b))
  } else if constexpr (kSums == 64) {
    FLASH_MLA_WGMMA_EITHER(128, 64, "%64, %65", "%66", "0, %67", "l"(a), "l"(b))
  } else {
    FLASH_MLA_WGMMA_EITHER(256, 128, "%128, %129", "%130", "0, %131", "l"(a), "l"(b))
  }
}

/// The same with A in registers.
template <bool kBf16, bool kMnMajor, int kSums>
__device__ __forceinline__ void wgmma_rs(float (&d)[kSums], const std::uint32_t (&a)[4], std::uint64_t b, bool accumulate) {
  static_assert(kSums == 8 || kSums == 16 || kSums == 32 || kSums == 64 || kSums == 128);
  if constexpr (kSums == 8) {
    FLASH_MLA_WGMMA_EITHER(16, 8, "{%8, %9, %10, %11}, %12", "%13", "%14",
                           "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  } else if constexpr (kSums == 16) {
    FLASH_MLA_WGMMA_EITHER(32, 16, "{%16, %17, %18, %19}, %20", "%21", "%22",
                           "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  } else if constexpr (kSums == 32) {
    FLASH_MLA_WGMMA_EITHER(64, 32, "{%32, %33, %34, %35}, %36", "%37", "%38",
                           "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  } else if constexpr (kSums == 64) {
    FLASH_MLA_WGMMA_EITHER(128, 64, "{%64, %65, %66, %67}, %68", "%69", "%70",
                           "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  } else {
    FLASH_MLA_WGMMA_EITHER(256, 128, "{%128, %129, %130, %131}, %132", "%133", "%134",
                           "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  }
}

#undef FLASH_MLA_WGMMA_EITHER
#undef FLASH_MLA_WGMMA
#undef FLASH_MLA_WGMMA_SUMS_128
#undef FLASH_MLA_WGMMA_SUMS_64
#undef FLASH_MLA_WGMMA_SUMS_32
#undef FLASH_MLA_WGMMA_SUMS_16
#undef FLASH_MLA_WGMMA_SUMS_32_AT
#undef FLASH_MLA_WGMMA_SUMS_8
#undef FLASH_MLA_WGMMA_SUMS_8_AT
#undef FLASH_MLA_WGMMA_TEXT_128
#undef FLASH_MLA_WGMMA_TEXT_64
#undef FLASH_MLA_WGMMA_TEXT_32
#undef FLASH_MLA_WGMMA_TEXT_16
#undef FLASH_MLA_WGMMA_TEXT_8

// clang-format on

}  // namespace flash_mla::sm90::ptx
