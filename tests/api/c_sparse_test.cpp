#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "base/element.h"
#include "flash_mla/c_api.h"
#include "flash_mla/dlpack.h"

namespace flash_mla {
namespace {

/// Tensors of a call, as C has them.
class Tensors {
 public:
  DLTensor* add(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
    views_[count_] = TensorView::contiguous(data, dtype, shape);
    tensors_[count_] = to_dlpack(views_[count_]);
    return &tensors_[count_++];
  }

 private:
  TensorView views_[16];
  DLTensor tensors_[16];
  std::size_t count_ = 0;
};

/// A cache of 656-byte tokens written through the C ABI: token i is (i + 1) / 8 everywhere, pages of 4.
struct Cache {
  std::vector<float> latent, rope;
  std::vector<std::int64_t> slots{0, 5, -1, 7};
  std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(2 * 4 * 656, 0xFF);
  Tensors tensors;
  flash_mla_kv_cache view{tensors.add(bytes.data(), DType::kUInt8, {2, 4, 1, 656}), FLASH_MLA_KV_FP8_V32,
                          1.0f};
  flash_mla_append_kv_args append{};

  Cache() {
    for (int i = 0; i < 4; ++i) {
      latent.insert(latent.end(), 512, static_cast<float>(i + 1) / 8);
      rope.insert(rope.end(), 64, static_cast<float>(i + 1) / 8);
    }
    append.latent = tensors.add(latent.data(), DType::kFloat32, {4, 512});
    append.rope = tensors.add(rope.data(), DType::kFloat32, {4, 64});
    append.slot_mapping = tensors.add(slots.data(), DType::kInt64, {4});
    append.cache = view;
  }
};

void* aligned(std::size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

TEST(CSparse, AppendGatherAndDecode) {
  Cache cache;
  ASSERT_EQ(flash_mla_append_kv(&cache.append, 1, nullptr), FLASH_MLA_OK) << flash_mla_last_error();
  std::vector<std::int32_t> slots{7, -1};
  std::vector<float> rows(2 * 576, NAN);
  Tensors t;
  ASSERT_EQ(flash_mla_gather_kv(&cache.view, t.add(slots.data(), DType::kInt32, {2}),
                                t.add(rows.data(), DType::kFloat32, {2, 576}), 0, nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(rows[0], 0.5f);
  EXPECT_EQ(rows[575], 0.5f);
  EXPECT_EQ(rows[576], 0.0f);

  std::vector<Bf16> q(2 * 576, to_bf16(0.0f)), out(2 * 512);
  std::vector<std::int32_t> indices{0, -1, 5, 5};
  std::vector<float> sink(2, -std::numeric_limits<float>::infinity()), lse(2);
  flash_mla_sparse_decode_args args{};
  args.q = t.add(q.data(), DType::kBFloat16, {1, 1, 2, 576});
  args.keys.cache = cache.view;
  args.keys.indices = t.add(indices.data(), DType::kInt32, {1, 1, 4});
  args.attn_sink = t.add(sink.data(), DType::kFloat32, {2});
  args.out = t.add(out.data(), DType::kBFloat16, {1, 1, 2, 512});
  args.lse = t.add(lse.data(), DType::kFloat32, {1, 2, 1});
  flash_mla_sparse_options options;
  flash_mla_sparse_options_init(&options);
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_sparse_decode_workspace_size(&args, &options, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  void* workspace = aligned(bytes);
  ASSERT_EQ(flash_mla_sparse_decode(&args, nullptr, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_NEAR(to_float(out[0]), (0.125 + 2 * 0.25) / 3, 1e-3);
  EXPECT_NEAR(lse[1], std::log(3.0), 1e-6);
  EXPECT_EQ(flash_mla_sparse_decode(&args, nullptr, workspace, bytes - 1), FLASH_MLA_INVALID_ARGUMENT);
  indices[1] = 8;
  EXPECT_EQ(flash_mla_sparse_decode(&args, nullptr, workspace, bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("keys.indices[0][0][1] is 8"), std::string::npos);
  std::free(workspace);
}

TEST(CSparse, PrefillAndDenseDecode) {
  Cache cache;
  ASSERT_EQ(flash_mla_append_kv(&cache.append, 1, nullptr), FLASH_MLA_OK) << flash_mla_last_error();
  Tensors t;
  std::vector<Bf16> q(2 * 576, to_bf16(0.0f)), out(2 * 512);
  std::vector<std::int32_t> indices{5, 1000, 0, -1};
  std::vector<float> max_logits(2), lse(2);
  flash_mla_sparse_prefill_args args{};
  args.q = t.add(q.data(), DType::kBFloat16, {2, 1, 576});
  args.cache = cache.view;
  args.indices = t.add(indices.data(), DType::kInt32, {2, 2});
  args.out = t.add(out.data(), DType::kBFloat16, {2, 1, 512});
  args.max_logits = t.add(max_logits.data(), DType::kFloat32, {2, 1});
  args.lse = t.add(lse.data(), DType::kFloat32, {2, 1});
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_sparse_prefill_workspace_size(&args, nullptr, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  void* workspace = aligned(bytes);
  ASSERT_EQ(flash_mla_sparse_prefill(&args, nullptr, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  std::free(workspace);
  EXPECT_EQ(to_float(out[0]), 0.25f);
  EXPECT_EQ(to_float(out[512]), 0.125f);

  // Page 1 has a token at offset 1; nothing was appended to offset 0.
  std::vector<std::int32_t> table{0}, lengths{1}, parts(8), splits(2);
  flash_mla_dense_fp8_decode_args dense{};
  DLTensor* seqlens = t.add(lengths.data(), DType::kInt32, {1});
  DLTensor* rows = t.add(parts.data(), DType::kInt32, {1, 8});
  DLTensor* num_splits = t.add(splits.data(), DType::kInt32, {2});
  ASSERT_EQ(flash_mla_build_decode_schedule(seqlens, nullptr, rows, num_splits), FLASH_MLA_OK);
  dense.q = t.add(q.data(), DType::kBFloat16, {1, 1, 2, 576});
  dense.cache = cache.view;
  dense.block_table = t.add(table.data(), DType::kInt32, {1, 1});
  dense.cache_seqlens = seqlens;
  dense.out = t.add(out.data(), DType::kBFloat16, {1, 1, 2, 512});
  dense.parts = rows;
  dense.num_splits = num_splits;
  ASSERT_EQ(flash_mla_dense_fp8_decode_workspace_size(&dense, nullptr, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  workspace = aligned(bytes);
  ASSERT_EQ(flash_mla_dense_fp8_decode(&dense, nullptr, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  std::free(workspace);
  EXPECT_EQ(to_float(out[1023]), 0.125f);
}

TEST(CSparse, Quantise) {
  std::vector<float> x{1, 2, 4, 448}, scales(1);
  std::vector<std::uint8_t> values(4);
  Tensors t;
  DLTensor* tx = t.add(x.data(), DType::kFloat32, {1, 4});
  DLTensor* tv = t.add(values.data(), DType::kUInt8, {1, 4});
  DLTensor* ts = t.add(scales.data(), DType::kFloat32, {1, 1});
  ASSERT_EQ(flash_mla_quantise_fp8(tx, 4, FLASH_MLA_FP8_SGLANG, tv, ts, nullptr), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(scales[0], 1.0f);
  EXPECT_EQ(values[3], 0x7E);
  EXPECT_EQ(flash_mla_quantise_fp8(tx, 4, 6, tv, ts, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "recipe is 6, expected 0 to 5");
  EXPECT_EQ(flash_mla_quantise_fp8(tx, 0, 0, tv, ts, nullptr), FLASH_MLA_INVALID_ARGUMENT);
}

TEST(CSparse, NullAndUnknownFormatsAreErrors) {
  Cache cache;
  std::size_t bytes = 0;
  flash_mla_sparse_decode_args decode{};
  flash_mla_sparse_prefill_args prefill{};
  flash_mla_dense_fp8_decode_args dense{};
  EXPECT_EQ(flash_mla_sparse_decode_workspace_size(nullptr, nullptr, &bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_sparse_decode_workspace_size(&decode, nullptr, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_sparse_decode(&decode, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "q is NULL, expected a pointer");
  EXPECT_EQ(flash_mla_sparse_prefill(&prefill, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_sparse_prefill_workspace_size(&prefill, nullptr, &bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_dense_fp8_decode(&dense, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_append_kv(nullptr, 0, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_gather_kv(nullptr, nullptr, nullptr, 0, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_quantise_fp8(nullptr, 1, 0, nullptr, nullptr, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  cache.append.cache.format = 5;
  EXPECT_EQ(flash_mla_append_kv(&cache.append, 0, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "cache.format is 5, expected 0 to 4");
}

}  // namespace
}  // namespace flash_mla
