// mla_cascade through the C ABI.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "c_tensor.h"
#include "flash_mla/c_api.h"

namespace flash_mla {
namespace {

TEST(CMlaCascade, OneKeyOfThePrefixAndOneOfItsOwn) {
  // One head, widths of 1: latents (c, r) = (2, 1) and (3, 0.5), W_UK = 2, W_UV = -1; the query is (1, 4).
  std::vector<float> cache{2, 1, 3, 0.5f}, kv_b{2, -1}, q{1, 4}, k(2), v(1), out{NAN}, lse{NAN};
  std::vector<std::int32_t> prefix_pages{0}, table{1}, lengths{1}, parts(8), splits(2);
  Tensor t_cache(cache.data(), DType::kFloat32, {2, 1, 1, 2}),
      t_kv_b(kv_b.data(), DType::kFloat32, {1, 2, 1}), t_q(q.data(), DType::kFloat32, {1, 1, 1, 2}),
      t_k(k.data(), DType::kFloat32, {1, 1, 2}), t_v(v.data(), DType::kFloat32, {1, 1, 1}),
      t_out(out.data(), DType::kFloat32, {1, 1, 1, 1}), t_lse(lse.data(), DType::kFloat32, {1, 1, 1}),
      t_pages(prefix_pages.data(), DType::kInt32, {1}), t_table(table.data(), DType::kInt32, {1, 1}),
      t_lengths(lengths.data(), DType::kInt32, {1}), t_parts(parts.data(), DType::kInt32, {1, 8}),
      t_splits(splits.data(), DType::kInt32, {2});
  ASSERT_EQ(flash_mla_build_decode_schedule(&t_lengths.tensor, nullptr, &t_parts.tensor, &t_splits.tensor),
            FLASH_MLA_OK);
  ASSERT_EQ(
      flash_mla_expand_latents(&t_cache.tensor, &t_pages.tensor, &t_kv_b.tensor, &t_k.tensor, &t_v.tensor, 1),
      FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(k[0], 4);
  EXPECT_EQ(k[1], 1);
  EXPECT_EQ(v[0], -2);
  flash_mla_mla_cascade_args args{&t_q.tensor,     &t_k.tensor,     &t_v.tensor,     &t_kv_b.tensor,
                                  &t_cache.tensor, &t_table.tensor, nullptr,         &t_out.tensor,
                                  &t_lse.tensor,   &t_parts.tensor, &t_splits.tensor};
  flash_mla_mla_cascade_options options;
  flash_mla_mla_cascade_options_init(&options);
  EXPECT_EQ(options.block_size, 64);
  options.softmax_scale = 0.5f;
  size_t bytes = 0;
  EXPECT_EQ(flash_mla_mla_cascade_workspace_size(&args, &options, &bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("cache_seqlens is NULL"), std::string::npos);
  args.cache_seqlens = &t_lengths.tensor;
  ASSERT_EQ(flash_mla_mla_cascade_workspace_size(&args, &options, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  EXPECT_EQ(flash_mla_mla_cascade(&args, &options, workspace, bytes), FLASH_MLA_OK) << flash_mla_last_error();
  std::free(workspace);
  // Scores (4 + 4) / 2 and (6 + 2) / 2, values -2 and -3.
  EXPECT_NEAR(out[0], -2.5f, 1e-5f);
  EXPECT_NEAR(lse[0], 4 + std::log(2.0f), 1e-5f);
}

}  // namespace
}  // namespace flash_mla
