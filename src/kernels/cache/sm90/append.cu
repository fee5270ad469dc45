// append_kv on Hopper: norm, RoPE and quantisation of a token between one read and one write.
//
// Tile:      a token for each warp, 4 warps a block.
// Threads:   lane l has the latent's elements 16 l to 16 l + 15 (lanes 28 to 31 have none where it is 448 wide)
//            and pair l of the rope part. A scale's tile is 8 lanes (128 elements) or 4 (64).
// Memory:    none that is shared; sums and maxima go through shuffles.
// Registers: at most 64, so that 32 tokens are under way on a multiprocessor: 4096 are one wave.
//
// What a token costs is the way to memory, twice: the slot, the position, the latent and the norm's weights
// are asked for together, the cosines when the position has come.

#include <algorithm>
#include <cstdint>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/cache/sm90/append.h"
#include "kernels/cache/sm90/elements.cuh"

namespace flash_mla::sm90 {
namespace {

using namespace cache;

struct AppendParams {
  const void* latent;
  const void* rope;
  std::int64_t latent_stride, rope_stride;  // elements
  bool wide_rows, whole_pairs;              // latents begin at multiples of 16 bytes, ropes of 4
  std::uint32_t n;
  Integers slots, positions;
  const float* norm_weight;
  bool has_norm, wide_weight, norm_whole;
  float norm_eps, norm_share;  // norm_share: 1 / elements
  const float* cos_sin;
  bool has_rope;
  std::int64_t cos_sin_stride;
  kv::Pool pool;
  SlotDivision division;
  int unit;  // alignment of its tokens
  Fp8Recipe recipe;
};

/// What most calls have in common: everything aligned and dense, norm and RoPE, integers of 64 bits, pages of a power of
/// two. Their kernel is compiled without the other cases, which saves a fifth of its instructions.
bool is_usual(const AppendParams& p) {
  const std::int64_t dense = kv::token_bytes(p.pool.format, p.pool.d_qk);
  return p.wide_rows && p.whole_pairs && p.has_norm && p.wide_weight && p.has_rope && p.unit == 16 &&
         p.slots.wide && p.positions.wide && p.division.small && p.division.shift >= 0 &&
         (p.pool.format == KvFormat::kFp8V4 || p.pool.token_stride == dense);
}

/// The parameters with what is known when a kernel is compiled.
template <KvFormat kFormat, bool kUsual>
__device__ __forceinline__ AppendParams known(const AppendParams& given) {
  AppendParams p = given;
  constexpr int kOwn = kv::format_d_qk(kFormat);
  if (kOwn != 0) p.pool.d_qk = kOwn;
  if (kUsual) {
    p.wide_rows = p.whole_pairs = p.has_norm = p.wide_weight = p.has_rope = true;
    p.slots.wide = p.positions.wide = p.division.small = true;
    p.unit = 16;
    if (kFormat != KvFormat::kFp8V4) p.pool.token_stride = kv::token_bytes(kFormat, p.pool.d_qk);
    __builtin_assume(p.division.shift >= 0);
  }
  return p;
}

/// A lane's share of a row.
struct Share {
  float latent[kLaneElements];
  float pair[2];
};

/// The sum of x over the warp, by halves, in every lane.
__device__ float sum_by_halves(float x) {
  for (int half = kWarp / 2; half > 0; half /= 2) {
    x = flash_mla::cache::add(x, __shfl_xor_sync(~0u, x, half));
  }
  return x;
}

/// The largest magnitude among the elements of `lanes` neighbouring lanes; NaN is passed over.
__device__ float tile_maximum(const float (&x)[kLaneElements], int lanes) {
  float highest = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) highest = fmaxf(highest, fabsf(x[i]));
  for (int half = lanes / 2; half > 0; half /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, half));
  }
  return highest;
}

/// Divides by one number many times, each quotient rounded as a division's: what the reciprocal gives, corrected
/// twice by its remainder, is (Markstein) the nearest where nothing overflows or vanishes. Quotients that e4m3
/// takes for 0 or for its largest may be other than a division's.
struct Divisor {
  float b, inverse;
  bool quick;

  __device__ explicit Divisor(float divisor)
      : b(divisor), inverse(quant::divide(1.0f, divisor)), quick(b >= 0x1p-60f && b <= 0x1p60f) {}
  __device__ float quotient(float a) const {
    if (!quick) return quant::divide(a, b);
    const float first = __fmul_rn(a, inverse);
    float q = __fmaf_rn(__fmaf_rn(-b, first, a), inverse, first);
    q = __fmaf_rn(__fmaf_rn(-b, q, a), inverse, q);
    q = copysignf(q, first);                    // a zero keeps its sign
    return fabsf(first) < 1024.0f ? q : first;  // beyond every e4m3, infinite or NaN
  }
};

/// 4 numbers as e4m3, to nearest, ties to even, beyond 448 +-448.
__device__ std::uint32_t e4m3x4(float a, float b, float c, float d) {
  std::uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return low | static_cast<std::uint32_t>(high) << 16;
}

/// 16 elements to bytes, each by way of `scaled`.
template <class F>
__device__ void quantise(const float (&x)[kLaneElements], std::uint32_t (&words)[4], const F& scaled) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = e4m3x4(scaled(x[4 * i]), scaled(x[4 * i + 1]), scaled(x[4 * i + 2]), scaled(x[4 * i + 3]));
  }
}

/// quant::quantise_value of a tile's elements.
__device__ void quantise(Fp8Recipe recipe, float scale, const float (&x)[kLaneElements],
                         std::uint32_t (&words)[4]) {
  if (recipe == Fp8Recipe::kVllm) {
    const Divisor divisor(scale);
    return quantise(x, words, [&](float v) { return divisor.quotient(v); });
  }
  if (recipe == Fp8Recipe::kFlashMla) {
    // Dividing by a power of two is multiplying by its reciprocal, which is the difference of exponents; of
    // infinity 0.
    const int exponents = max(0x7F000000 - __float_as_int(scale), 0);
    const float inverse = __int_as_float(exponents);
    return quantise(x, words, [&](float v) { return __fmul_rn(v, inverse); });
  }
  const float inverse = quant::divide(1.0f, scale);  // of a tile of zeros infinite
  quantise(x, words, [&](float v) { return v == 0.0f ? v : __fmul_rn(v, inverse); });
}

/// The token's latent gets what this lane has of it. All lanes call it.
template <KvFormat kFormat>
__device__ void store_latent(const AppendParams& p, const float (&x)[kLaneElements], const kv::Token& token,
                             int lane, bool has_latent) {
  std::uint32_t words[4];
  std::byte* const place = token.latent + lane * kLaneElements;
  if constexpr (kFormat == KvFormat::kFp8V32) {
    constexpr int kTileLanes = kv::Fp8V32::kTile / kLaneElements;
    const float scale = quant::tile_scale(p.recipe, tile_maximum(x, kTileLanes));
    quantise(p.recipe, scale, x, words);
    store<16>(place, words, p.unit);
    if (lane % kTileLanes == 0) {
      store<4>(token.scales + lane / kTileLanes * static_cast<int>(sizeof(scale)), &scale, p.unit);
    }
  } else if constexpr (kFormat == KvFormat::kFp8V4) {
    constexpr int kTileLanes = kv::Fp8V4::kTile / kLaneElements;
    const float scale = quant::tile_scale(Fp8Recipe::kFlashMla, tile_maximum(x, kTileLanes));
    quantise(Fp8Recipe::kFlashMla, scale, x, words);
    if (has_latent) store<16>(place, words, p.unit);
    // Behind the 7 scales the spare byte, 0.
    if (lane % kTileLanes == 0)
      token.scales[lane / kTileLanes] = has_latent ? std::byte{to_e8m0(scale).bits} : std::byte{0};
  } else if constexpr (kFormat == KvFormat::kFp8Tensor) {
    const Divisor divisor(p.pool.scale);
    quantise(x, words, [&](float v) { return divisor.quotient(v); });
    store<16>(place, words, p.unit);
  } else {
    using T = std::conditional_t<kFormat == KvFormat::kFloat16, Fp16, Bf16>;
    for (int half = 0; half < 2 && has_latent; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = halves<T>(x[8 * half + 2 * i], x[8 * half + 2 * i + 1]);
      store<16>(token.latent + 2 * (lane * kLaneElements + 8 * half), words, p.unit);
    }
  }
}

/// The token's rope part gets this lane's pair.
template <KvFormat kFormat>
__device__ void store_pair(const AppendParams& p, const float (&pair)[2], std::byte* rope, int lane) {
  if constexpr (kFormat == KvFormat::kFp8Tensor) {
    const Divisor divisor(p.pool.scale);
    const std::uint32_t two = e4m3x4(divisor.quotient(pair[0]), divisor.quotient(pair[1]), 0, 0);
    for (int j = 0; j < 2; ++j) rope[2 * lane + j] = static_cast<std::byte>(two >> 8 * j);
  } else {
    using T = std::conditional_t<kFormat == KvFormat::kFloat16, Fp16, Bf16>;
    const std::uint32_t word = halves<T>(pair[0], pair[1]);
    store<4>(rope + 4 * lane, &word, p.unit);
  }
}

/// As if stored as T and read back; of a NaN some NaN.
template <class T>
__device__ void round_pair(float& a, float& b) {
  if constexpr (!std::is_same_v<T, float>) unpack<T>(pack<T>(a, b), a, b);
}

/// RMSNorm of this lane's share; all lanes call it.
template <class T>
__device__ void norm(const AppendParams& p, Share& x, const float (&weight)[kLaneElements], int lane) {
  float squares = flash_mla::cache::lane_squares(x.latent);
  if (p.norm_whole) squares = flash_mla::cache::with_pair_squares(squares, x.pair);
  const float factor = flash_mla::cache::norm_factor(sum_by_halves(squares), p.norm_share, p.norm_eps);
#pragma unroll
  for (int i = 0; i < kLaneElements; i += 2) {
    for (int j = i; j < i + 2; ++j) x.latent[j] = __fmul_rn(__fmul_rn(x.latent[j], factor), weight[j]);
    round_pair<T>(x.latent[i], x.latent[i + 1]);
  }
  if (!p.norm_whole) return;
  const float* weights = p.norm_weight + p.pool.latent() + 2 * lane;
  for (int j = 0; j < 2; ++j) x.pair[j] = __fmul_rn(__fmul_rn(x.pair[j], factor), weights[j]);
  round_pair<T>(x.pair[0], x.pair[1]);
}

template <class T, KvFormat kFormat, bool kUsual>
__global__ void __launch_bounds__(kWarps* kWarp, 8)
    append_kernel(const __grid_constant__ AppendParams given) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const AppendParams p = known<kFormat, kUsual>(given);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const std::uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (t >= p.n) return;
  const bool has_latent = lane * kLaneElements < p.pool.latent();
  const Integers::Raw raw_slot = p.slots.load(t);
  Integers::Raw raw_position{};
  if (p.has_rope) raw_position = p.positions.load(t);
  Raw<T, kLaneElements> latent{};
  Raw<float, kLaneElements> weight{};
  if (has_latent) {
    latent.template load<16>(static_cast<const T*>(p.latent) + t * p.latent_stride + lane * kLaneElements,
                             p.wide_rows);
    if (p.has_norm) weight.template load<16>(p.norm_weight + lane * kLaneElements, p.wide_weight);
  }
  Raw<T, 2> pair;
  pair.template load<4>(static_cast<const T*>(p.rope) + t * p.rope_stride + 2 * lane, p.whole_pairs);
  __syncwarp();  // or the compiler moves the loads above behind the branch below, which waits for the slot
  const std::int64_t slot = p.slots.value(raw_slot);
  if (slot < 0) return;  // of the whole warp; its position may be anything
  float cosine = 1.0f, sine = 0.0f;
  if (p.has_rope) {
    const float* row = p.cos_sin + p.positions.value(raw_position) * p.cos_sin_stride + lane;
    cosine = row[0];
    sine = row[kv::kRopeWidth / 2];
  }
  const kv::Token token = locate<kFormat>(p.pool, slot, p.division);
  Share x;
  latent.to_floats(x.latent);
  pair.to_floats(x.pair);
  if (p.has_norm) {
    float weights[kLaneElements];
    weight.to_floats(weights);
    norm<T>(p, x, weights, lane);
  }
  store_latent<kFormat>(p, x.latent, token, lane, has_latent);
  // Last of all, since the cosines are what comes last.
  if (p.has_rope) {
    flash_mla::cache::rotate(x.pair, cosine, sine);
    round_pair<T>(x.pair[0], x.pair[1]);
  }
  store_pair<kFormat>(p, x.pair, token.rope, lane);
}

using Kernel = void (*)(AppendParams);

template <class T, KvFormat kFormat>
Kernel kernel_of(bool usual) {
  // Of other dtypes than bfloat16 there are no usual calls.
  if constexpr (std::is_same_v<T, Bf16>) {
    if (usual) return append_kernel<T, kFormat, true>;
  }
  return append_kernel<T, kFormat, false>;
}

template <class T>
Kernel kernel_of(KvFormat format, bool usual) {
  switch (format) {
    case KvFormat::kBFloat16:
      return kernel_of<T, KvFormat::kBFloat16>(usual);
    case KvFormat::kFloat16:
      return kernel_of<T, KvFormat::kFloat16>(usual);
    case KvFormat::kFp8V32:
      return kernel_of<T, KvFormat::kFp8V32>(usual);
    case KvFormat::kFp8V4:
      return kernel_of<T, KvFormat::kFp8V4>(usual);
    default:
      return kernel_of<T, KvFormat::kFp8Tensor>(usual);
  }
}

AppendParams params_of(const KvAppendArgs& args) {
  const auto alignment = [](const TensorView& t) {
    const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
    return common_alignment({static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)),
                             t.size(0) > 1 ? t.stride(0) * element : 0});
  };
  AppendParams p{};
  p.latent = args.latent.data;
  p.rope = args.rope.data;
  p.latent_stride = args.latent.stride(0);
  p.rope_stride = args.rope.stride(0);
  p.wide_rows = alignment(args.latent) == 16;
  p.whole_pairs = alignment(args.rope) >= 4;
  p.n = count_of(args.latent, "latent");
  p.slots = integers(args.slot_mapping);
  p.pool = kv::make_pool(args.cache);
  p.division = slot_division(p.pool);
  p.unit = pool_alignment(p.pool);
  p.recipe = args.recipe;
  if (args.norm_weight.defined()) {
    p.has_norm = true;
    p.norm_weight = args.norm_weight.ptr<const float>();
    p.norm_whole = args.norm_weight.size(0) > p.pool.latent();
    p.wide_weight = reinterpret_cast<std::uintptr_t>(p.norm_weight) % 16 == 0;
    p.norm_eps = args.norm_eps;
    p.norm_share = 1.0f / static_cast<float>(args.norm_weight.size(0));
  }
  if (args.positions.defined()) {
    p.has_rope = true;
    p.positions = integers(args.positions);
    p.cos_sin = args.cos_sin.ptr<const float>();
    p.cos_sin_stride = args.cos_sin.stride(0);
  }
  return p;
}

}  // namespace

void append_kv(const KvAppendArgs& args, void* stream) {
  require_device(args.latent.device.index);
  const DeviceGuard guard(args.latent.device.index);
  const AppendParams p = params_of(args);
  const KvFormat format = p.pool.format;
  const bool usual = is_usual(p);
  const Kernel kernel = args.latent.dtype == DType::kFloat32   ? kernel_of<float>(format, usual)
                        : args.latent.dtype == DType::kFloat16 ? kernel_of<Fp16>(format, usual)
                                                               : kernel_of<Bf16>(format, usual);
  const dim3 grid(static_cast<unsigned>((p.n + kWarps - 1) / kWarps));
  check(launch(LaunchConfig(grid, kWarps * kWarp, 0, static_cast<cudaStream_t>(stream)).programmatic(),
               kernel, p),
        "append_kernel");
}

}  // namespace flash_mla::sm90
