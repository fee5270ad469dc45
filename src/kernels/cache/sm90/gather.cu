// gather_kv on Hopper: tokens of a cache, dequantised, to rows.
//
// Tile:      a token for each warp, 4 warps a block.
// Threads:   lane l has the latent's elements 16 l to 16 l + 15 (lanes 28 to 31 have none where it is 448 wide)
//            and the rope part's 2 l and 2 l + 1.
// Memory:    none that is shared.
// Registers: at most 64.

#include <algorithm>
#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/cache/sm90/elements.cuh"
#include "kernels/cache/sm90/gather.h"

namespace flash_mla::sm90 {
namespace {

using namespace cache;

struct GatherParams {
  void* out;
  std::int64_t out_stride;  // elements
  int out_unit;             // alignment of out's rows
  std::uint32_t n;
  Integers slots;
  kv::Pool pool;
  SlotDivision division;
  int unit;  // alignment of its tokens
};

/// 4 e4m3, each times the scale.
__device__ void dequantise(std::uint32_t word, float scale, float* to) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    std::uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<std::uint16_t>(word >> 16 * i)));
    to[2 * i] = __fmul_rn(__half2float(__ushort_as_half(static_cast<std::uint16_t>(pair))), scale);
    to[2 * i + 1] = __fmul_rn(__half2float(__ushort_as_half(static_cast<std::uint16_t>(pair >> 16))), scale);
  }
}

/// What this lane has of a token: 16 elements of the latent and 2 of the rope part.
template <KvFormat kFormat>
__device__ void read_share(const GatherParams& p, const kv::Token& token, int lane, bool has_latent,
                           float (&latent)[kLaneElements], float (&pair)[2]) {
  std::uint32_t words[8], rope = 0;
  if constexpr (kv::is_fp8(kFormat)) {
    float scale = p.pool.scale;
    if (has_latent) {
      load<16>(words, token.latent + lane * kLaneElements, p.unit);
      if constexpr (kFormat == KvFormat::kFp8V32) {
        constexpr int kTileLanes = kv::Fp8V32::kTile / kLaneElements;
        load<4>(&scale, token.scales + lane / kTileLanes * static_cast<int>(sizeof(scale)), p.unit);
      } else if constexpr (kFormat == KvFormat::kFp8V4) {
        constexpr int kTileLanes = kv::Fp8V4::kTile / kLaneElements;
        scale = to_float(E8m0{static_cast<std::uint8_t>(token.scales[lane / kTileLanes])});
      }
      for (int i = 0; i < 4; ++i) dequantise(words[i], scale, latent + 4 * i);
    }
    if constexpr (kFormat == KvFormat::kFp8Tensor) {
      float four[4];
      for (int j = 0; j < 2; ++j) rope |= static_cast<std::uint32_t>(token.rope[2 * lane + j]) << 8 * j;
      dequantise(rope, scale, four);
      pair[0] = four[0], pair[1] = four[1];
    } else {
      load<4>(&rope, token.rope + 4 * lane, p.unit);
      unpack<Bf16>(rope, pair[0], pair[1]);
    }
  } else {
    using T = std::conditional_t<kFormat == KvFormat::kFloat16, Fp16, Bf16>;
    if (has_latent) {
      load<16>(words, token.latent + lane * 2 * kLaneElements, p.unit);
      load<16>(words + 4, token.latent + lane * 2 * kLaneElements + 16, p.unit);
      for (int i = 0; i < 8; ++i) unpack<T>(words[i], latent[2 * i], latent[2 * i + 1]);
    }
    load<4>(&rope, token.rope + 4 * lane, p.unit);
    unpack<T>(rope, pair[0], pair[1]);
  }
}

template <class T, KvFormat kFormat>
__global__ void __launch_bounds__(kWarps* kWarp, 8) gather_kernel(const __grid_constant__ GatherParams p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (t >= p.n) return;
  const bool has_latent = lane * kLaneElements < p.pool.latent();
  float latent[kLaneElements] = {}, pair[2] = {};
  const std::int64_t slot = p.slots.value(p.slots.load(t));
  if (slot >= 0) {
    read_share<kFormat>(p, locate<kFormat>(p.pool, slot, p.division), lane, has_latent, latent, pair);
  }
  auto* const out = static_cast<T*>(p.out) + t * p.out_stride;
  if (has_latent) {
    alignas(16) T row[kLaneElements];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) row[i] = from_float<T>(latent[i]);
    auto* const place = reinterpret_cast<std::byte*>(out + lane * kLaneElements);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(row) / 16); ++i) {
      store<16>(place + 16 * i, reinterpret_cast<const std::byte*>(row) + 16 * i, p.out_unit);
    }
  }
  T* const rope = out + p.pool.latent() + 2 * lane;
  for (int j = 0; j < 2; ++j) rope[j] = from_float<T>(pair[j]);
}

template <class T>
void (*kernel_of(KvFormat format))(GatherParams) {
  switch (format) {
    case KvFormat::kBFloat16:
      return gather_kernel<T, KvFormat::kBFloat16>;
    case KvFormat::kFloat16:
      return gather_kernel<T, KvFormat::kFloat16>;
    case KvFormat::kFp8V32:
      return gather_kernel<T, KvFormat::kFp8V32>;
    case KvFormat::kFp8V4:
      return gather_kernel<T, KvFormat::kFp8V4>;
    default:
      return gather_kernel<T, KvFormat::kFp8Tensor>;
  }
}

}  // namespace

void gather_kv(const KvGatherArgs& args, void* stream) {
  require_device(args.out.device.index);
  const DeviceGuard guard(args.out.device.index);
  GatherParams p{};
  p.out = args.out.data;
  p.out_stride = args.out.stride(0);
  const auto element = static_cast<std::int64_t>(dtype_size(args.out.dtype));
  p.out_unit = common_alignment({static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p.out)),
                                 args.out.size(0) > 1 ? p.out_stride * element : 0});
  p.n = count_of(args.out, "out");
  p.slots = integers(args.slots);
  p.pool = kv::make_pool(args.cache);
  p.division = slot_division(p.pool);
  p.unit = pool_alignment(p.pool);
  const KvFormat format = p.pool.format;
  const auto kernel = args.out.dtype == DType::kFloat32   ? kernel_of<float>(format)
                      : args.out.dtype == DType::kFloat16 ? kernel_of<Fp16>(format)
                                                          : kernel_of<Bf16>(format);
  const dim3 grid(static_cast<unsigned>((p.n + kWarps - 1) / kWarps));
  check(launch(LaunchConfig(grid, kWarps * kWarp, 0, static_cast<cudaStream_t>(stream)).programmatic(),
               kernel, p),
        "gather_kernel");
}

}  // namespace flash_mla::sm90
