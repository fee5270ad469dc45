// append_kv and gather_kv (include/flash_mla/kv_cache.h) on every backend: through odd strides, and the same bytes as the
// CPU with norm and RoPE.

#include "base/element.h"
#include "cache_reference.h"
#include "sparse_problem.h"

namespace flash_mla::conformance {
namespace {

class CacheBytes : public CacheTest {};

INSTANTIATE_TEST_SUITE_P(Backends, CacheBytes, ::testing::ValuesIn(backends_under_test()),
                         [](const auto& b) { return b.param->name(); });

/// A cache whose pages and tokens, and rows whose beginnings, lie at no multiple of anything.
TEST_P(CacheBytes, NumericsOfOddStrides) {
  constexpr int kTokens = 23, kPage = 5, kPages = 9, kGapRow = 7;
  for (const KvFormat format :
       {KvFormat::kBFloat16, KvFormat::kFloat16, KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
    if (!backend().supports(Operation::kAppend, format, DType::kBFloat16)) continue;
    const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576, latent = d_qk - 64;
    const bool fp8 = format != KvFormat::kBFloat16 && format != KvFormat::kFloat16;
    const std::int64_t width = format == KvFormat::kFp8V32 ? 656 : format == KvFormat::kFp8V4 ? 584 : 576;
    const std::int64_t token = format == KvFormat::kFp8V4 ? width : width + 3, page = kPage * token + 11;
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kPages * page) * (fp8 ? 1 : 2) + 1, 0xC3);
    const Tokens tokens(kTokens, latent, DType::kBFloat16, 6);
    // Latent and rope are parts of wider rows.
    std::vector<std::uint8_t> rows(static_cast<std::size_t>(kTokens) * (576 + kGapRow) * 2, 0xFF);
    std::vector<std::int32_t> slots;
    for (int i = 0; i < kTokens; ++i) {
      std::memcpy(&rows[static_cast<std::size_t>(i * (576 + kGapRow)) * 2],
                  &tokens.latent[static_cast<std::size_t>(i * latent) * 2],
                  static_cast<std::size_t>(latent) * 2);
      std::memcpy(&rows[static_cast<std::size_t>(i * (576 + kGapRow) + latent) * 2],
                  &tokens.rope[static_cast<std::size_t>(i) * 128], 128);
      slots.push_back(i == 4 ? -1 : (i * 7 + 3) % (kPage * kPages));
    }
    KvAppendArgs a;
    a.cache.format = format;
    a.cache.scale = 0.07f;
    a.recipe = Fp8Recipe::kVllm;
    const DType cache_dtype = fp8                            ? DType::kUInt8
                              : format == KvFormat::kFloat16 ? DType::kFloat16
                                                             : DType::kBFloat16;
    a.cache.data = TensorView::contiguous(nullptr, cache_dtype, {kPages, kPage, 1, width});
    a.cache.data.strides[0] = page;
    a.cache.data.strides[1] = token;
    a.latent = TensorView::contiguous(nullptr, DType::kBFloat16, {kTokens, latent});
    a.rope = TensorView::contiguous(nullptr, DType::kBFloat16, {kTokens, 64});
    a.latent.strides[0] = a.rope.strides[0] = 576 + kGapRow;
    a.slot_mapping = TensorView::contiguous(nullptr, DType::kInt32, {kTokens});
    const auto d_cache = upload(a.cache.data, bytes.data(), bytes.size());
    const auto d_rows = upload(a.latent, rows.data(), rows.size());
    const auto d_slots = upload(a.slot_mapping, slots.data(), slots.size() * 4);
    const std::size_t shift = fp8 ? 1 : 0;
    a.cache.data.data = static_cast<std::uint8_t*>(a.cache.data.data) + shift;
    a.rope.data = static_cast<std::uint8_t*>(a.latent.data) + static_cast<std::ptrdiff_t>(latent) * 2;
    a.rope.device = a.latent.device;
    append_kv(a);
    const std::vector<std::uint8_t> got = d_cache->download();
    for (int i = 0; i < kTokens; ++i) {
      if (slots[static_cast<std::size_t>(i)] < 0) continue;
      for (const auto& [at, byte] :
           expected_bytes(a, tokens.row(i).data(), slots[static_cast<std::size_t>(i)]))
        bytes[at + shift] = byte;
    }
    for (std::size_t at = 0; at < got.size(); ++at) {
      const bool nan = (bytes[at] & 0x7F) == 0x7F && (got[at] & 0x7F) == 0x7F;
      ASSERT_TRUE(got[at] == bytes[at] || nan) << kv_format_name(format) << " byte " << at << " is "
                                               << int{got[at]} << ", expected " << int{bytes[at]};
    }

    // And back: what the same bytes in dense memory of the host are.
    std::vector<float> dense(static_cast<std::size_t>(kTokens) * 576, kNan);
    std::vector<std::uint16_t> back(static_cast<std::size_t>(kTokens) * 583, 0xFFFF);
    KvGatherArgs g;
    g.cache = a.cache;
    g.cache.data.data = bytes.data() + shift;
    g.cache.data.device = {};
    g.slots = TensorView::contiguous(slots.data(), DType::kInt32, {kTokens});
    g.out = TensorView::contiguous(dense.data(), DType::kFloat32, {kTokens, d_qk});
    gather_kv(g);
    g.cache = a.cache;
    g.slots = a.slot_mapping;
    g.out = TensorView::contiguous(nullptr, DType::kBFloat16, {kTokens, d_qk});
    g.out.strides[0] = 583;
    const auto d_out = upload(g.out, back.data(), back.size() * 2);
    gather_kv(g);
    const std::vector<std::uint8_t> out = d_out->download();
    for (std::size_t i = 0; i < kTokens; ++i) {
      for (std::size_t d = 0; d < 583; ++d) {
        Bf16 x{};
        std::memcpy(&x, &out[(i * 583 + d) * 2], 2);
        if (d >= static_cast<std::size_t>(d_qk)) {
          ASSERT_TRUE(x.bits == 0xFFFF || i + 1 == kTokens) << "between rows";
          continue;
        }
        const float want = dense[i * static_cast<std::size_t>(d_qk) + d];
        ASSERT_TRUE(x.bits == to_bf16(want).bits || (std::isnan(want) && std::isnan(to_float(x))))
            << kv_format_name(format) << " " << i << " " << d << ": " << to_float(x) << ", expected " << want;
      }
    }
  }
}

/// The CPU's bytes, norm and RoPE included, in every format and dtype.
TEST_P(CacheBytes, NumericsOfNormAndRopeAreTheCpusBits) {
  constexpr int kTokens = 50;
  std::mt19937 rng(11);
  std::normal_distribution<float> normal;
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat32}) {
    for (const KvFormat format : {KvFormat::kBFloat16, KvFormat::kFloat16, KvFormat::kFp8V32,
                                  KvFormat::kFp8V4, KvFormat::kFp8Tensor}) {
      if (!backend().supports(Operation::kAppend, format, dtype)) continue;
      for (const bool whole : {false, true}) {
        const int d_qk = format == KvFormat::kFp8V4 ? 512 : 576, latent = d_qk - 64;
        const int normed = whole ? d_qk : latent;
        Tokens tokens(0, latent, dtype, 1);
        for (int i = 0; i < kTokens * d_qk; ++i)
          tokens.add(normal(rng), i < kTokens * latent ? tokens.latent : tokens.rope);
        std::vector<float> weight, cos_sin;
        for (int i = 0; i < normed; ++i) weight.push_back(1 + normal(rng) / 4);
        for (int i = 0; i < 64 * 64; ++i) cos_sin.push_back(normal(rng));
        std::vector<std::int64_t> slots, positions;
        for (int i = 0; i < kTokens; ++i) {
          slots.push_back(i % 9 == 5 ? -1 : (i * 37 + 5) % 64);
          positions.push_back(i % 9 == 5 ? std::int64_t{1} << 60 : static_cast<std::int64_t>(rng() % 64));
        }
        TestPool pool({.format = format, .tokens = 64, .page_size = 8}, d_qk,
                      format == KvFormat::kFloat16 ? DType::kFloat16 : DType::kBFloat16, 9);
        std::vector<std::uint8_t> expected = pool.bytes;
        KvAppendArgs a;
        a.cache = pool.view(expected.data(), {});
        a.cache.scale = 0.011f;
        a.recipe = whole ? Fp8Recipe::kVllm : Fp8Recipe::kSglang;
        a.latent = TensorView::contiguous(tokens.latent.data(), dtype, {kTokens, latent});
        a.rope = TensorView::contiguous(tokens.rope.data(), dtype, {kTokens, 64});
        a.slot_mapping = TensorView::contiguous(slots.data(), DType::kInt64, {kTokens});
        a.norm_weight = TensorView::contiguous(weight.data(), DType::kFloat32, {normed});
        a.positions = TensorView::contiguous(positions.data(), DType::kInt64, {kTokens});
        a.cos_sin = TensorView::contiguous(cos_sin.data(), DType::kFloat32, {64, 64});
        append_kv(a);
        const auto d_cache = upload(a.cache.data, pool.bytes.data(), pool.bytes.size());
        const auto d_latent = upload(a.latent, tokens.latent.data(), tokens.latent.size());
        const auto d_rope = upload(a.rope, tokens.rope.data(), tokens.rope.size());
        const auto d_slots = upload(a.slot_mapping, slots.data(), slots.size() * 8);
        const auto d_weight = upload(a.norm_weight, weight.data(), weight.size() * 4);
        const auto d_positions = upload(a.positions, positions.data(), positions.size() * 8);
        const auto d_cos_sin = upload(a.cos_sin, cos_sin.data(), cos_sin.size() * 4);
        append_kv(a);
        EXPECT_TRUE(d_cache->download() == expected)
            << kv_format_name(format) << " " << dtype_name(dtype) << (whole ? " whole" : " latent");
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::conformance
