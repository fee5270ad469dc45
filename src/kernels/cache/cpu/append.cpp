#include "kernels/cache/cpu/append.h"

#include <array>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/cache/cpu/tokens.h"
#include "kernels/cache/row.h"
#include "kernels/quant/cpu/quantise.h"
#include "kv/format.h"

namespace flash_mla::cpu {
namespace {

constexpr int kMaxRow = 576;

/// x as it would be read back from a tensor of `dtype`.
float rounded(float x, DType dtype) {
  if (dtype == DType::kBFloat16) return to_float(to_bf16(x));
  if (dtype == DType::kFloat16) return to_float(to_fp16(x));
  return x;
}

void rms_norm(float* x, const float* weight, float eps, int n, int latent, DType dtype) {
  std::array<float, cache::kLanes> sums{};
  for (std::size_t lane = 0; lane < sums.size(); ++lane) {
    const int at = static_cast<int>(lane) * cache::kLaneElements;
    if (at < latent) sums[lane] = cache::lane_squares(x + at);
    if (n > latent) sums[lane] = cache::with_pair_squares(sums[lane], x + latent + 2 * lane);
  }
  for (std::size_t half = sums.size() / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  const float factor = cache::norm_factor(sums[0], 1.0f / static_cast<float>(n), eps);
  for (int i = 0; i < n; ++i) x[i] = rounded(x[i] * factor * weight[i], dtype);
}

void rotate(float* x, const float* cosines, const float* sines, DType dtype) {
  for (int i = 0; i < kv::kRopeWidth / 2; ++i) {
    cache::rotate(x + 2 * static_cast<std::ptrdiff_t>(i), cosines[i], sines[i]);
    for (int j = 2 * i; j < 2 * i + 2; ++j) x[j] = rounded(x[j], dtype);
  }
}

void store_halves(const float* x, int n, KvFormat format, std::byte* to) {
  for (int i = 0; i < n; ++i) {
    const std::uint16_t bits = format == KvFormat::kFloat16 ? to_fp16(x[i]).bits : to_bf16(x[i]).bits;
    std::memcpy(to + 2 * static_cast<std::ptrdiff_t>(i), &bits, sizeof(bits));
  }
}

/// One token's row, latent and rope, into its place.
void store_token(const float* row, const KvAppendArgs& args, const kv::Pool& pool, const kv::Token& token) {
  auto* values = reinterpret_cast<E4m3*>(token.latent);
  switch (pool.format) {
    case KvFormat::kFp8V32:
      for (int t = 0; t < kv::Fp8V32::kScales; ++t) {
        const int at = t * kv::Fp8V32::kTile;
        const float scale = quantise_tile(row + at, kv::Fp8V32::kTile, args.recipe, values + at);
        std::memcpy(token.scales + t * sizeof(scale), &scale, sizeof(scale));
      }
      break;
    case KvFormat::kFp8V4:
      for (int t = 0; t < kv::Fp8V4::kScales; ++t) {
        const int at = t * kv::Fp8V4::kTile;
        const float scale = quantise_tile(row + at, kv::Fp8V4::kTile, Fp8Recipe::kFlashMla, values + at);
        token.scales[t] = std::byte{to_e8m0(scale).bits};
      }
      token.scales[kv::Fp8V4::kScales] = std::byte{0};
      break;
    case KvFormat::kFp8Tensor:
      for (int i = 0; i < kv::Fp8Tensor::kTokenBytes; ++i) values[i] = to_e4m3(row[i] / pool.scale);
      return;
    default:
      return store_halves(row, pool.d_qk, pool.format, token.latent);
  }
  store_halves(row + pool.latent(), kv::kRopeWidth, pool.format, token.rope);
}

}  // namespace

void append_kv(const KvAppendArgs& args, int num_threads) {
  const kv::Pool pool = kv::make_pool(args.cache);
  const int latent = pool.latent();
  const DType dtype = args.latent.dtype;
  for_each_token(args.latent.size(0), num_threads, [&](std::int64_t i) {
    const std::int64_t slot = integer(args.slot_mapping, i);
    if (slot < 0) return;
    std::array<float, kMaxRow> row;
    visit_float_type(dtype, [&](auto element) {
      using T = decltype(element);
      const T* from = args.latent.ptr<const T>() + i * args.latent.stride(0);
      for (int d = 0; d < latent; ++d)
        row[static_cast<std::size_t>(d)] = static_cast<float>(to_float(from[d]));
      from = args.rope.ptr<const T>() + i * args.rope.stride(0);
      for (int d = 0; d < kv::kRopeWidth; ++d) {
        row[static_cast<std::size_t>(latent) + static_cast<std::size_t>(d)] =
            static_cast<float>(to_float(from[d]));
      }
    });
    if (args.norm_weight.defined()) {
      rms_norm(row.data(), args.norm_weight.ptr<const float>(), args.norm_eps,
               static_cast<int>(args.norm_weight.size(0)), latent, dtype);
    }
    if (args.positions.defined()) {
      const float* cosines =
          args.cos_sin.ptr<const float>() + integer(args.positions, i) * args.cos_sin.stride(0);
      rotate(row.data() + latent, cosines, cosines + kv::kRopeWidth / 2, dtype);
    }
    store_token(row.data(), args, pool, kv::locate(pool, slot));
  });
}

}  // namespace flash_mla::cpu
