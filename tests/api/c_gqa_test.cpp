// gqa_attention through the C ABI.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "c_tensor.h"
#include "flash_mla/c_api.h"

namespace flash_mla {
namespace {

TEST(CGqa, TwoKeysWithASinkAndASchedule) {
  // One query, two heads over one key head; the second page's key is twice the query, the first's is 0.
  constexpr float kRoot = 1.41421356f;
  std::vector<float> q{1, 1, 1, 1}, k{2, 2, 0, 0}, v{10, 20, 30, 40}, out(4, NAN), lse(2, NAN),
      sinks{0, -INFINITY};
  std::vector<std::int32_t> lengths{2}, table{1, 0}, parts(8), splits(2);
  Tensor t_q(q.data(), DType::kFloat32, {1, 2, 2}), t_k(k.data(), DType::kFloat32, {2, 1, 1, 2}),
      t_v(v.data(), DType::kFloat32, {2, 1, 1, 2}), t_lengths(lengths.data(), DType::kInt32, {1}),
      t_table(table.data(), DType::kInt32, {1, 2}), t_out(out.data(), DType::kFloat32, {1, 2, 2}),
      t_lse(lse.data(), DType::kFloat32, {2, 1}), t_sinks(sinks.data(), DType::kFloat32, {2}),
      t_parts(parts.data(), DType::kInt32, {1, 8}), t_splits(splits.data(), DType::kInt32, {2});
  ASSERT_EQ(flash_mla_build_decode_schedule(&t_lengths.tensor, nullptr, &t_parts.tensor, &t_splits.tensor),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  flash_mla_gqa_args args{};
  args.q = &t_q.tensor;
  args.k = &t_k.tensor;
  args.v = &t_v.tensor;
  args.seqlens_k = &t_lengths.tensor;
  args.block_table = &t_table.tensor;
  args.sinks = &t_sinks.tensor;
  args.out = &t_out.tensor;
  args.lse = &t_lse.tensor;
  args.parts = &t_parts.tensor;
  flash_mla_gqa_options options;
  flash_mla_gqa_options_init(&options);
  size_t bytes = 0;
  EXPECT_EQ(flash_mla_gqa_workspace_size(&args, &options, &bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("num_splits is NULL"), std::string::npos);
  args.num_splits = &t_splits.tensor;
  ASSERT_EQ(flash_mla_gqa_workspace_size(&args, &options, &bytes), FLASH_MLA_OK) << flash_mla_last_error();
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  ASSERT_EQ(flash_mla_gqa_attention(&args, &options, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  // Scores 0 and 4 / sqrt(2); the first head's sink is a third of score 0 and value 0.
  const float e = std::exp(2 * kRoot);
  for (const int head : {0, 1}) {
    const float sum = head == 0 ? e + 2 : e + 1;
    EXPECT_NEAR(out[static_cast<std::size_t>(2 * head)], (30 + 10 * e) / sum, 1e-4f);
    EXPECT_NEAR(out[static_cast<std::size_t>(2 * head + 1)], (40 + 20 * e) / sum, 1e-4f);
    EXPECT_NEAR(lse[static_cast<std::size_t>(head)], std::log(e + 1), 1e-5f);
  }
  options.window_left = 0;
  ASSERT_EQ(flash_mla_gqa_attention(&args, &options, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_NEAR(out[2], 10, 1e-5f);
  EXPECT_EQ(options.num_scheduled, -1);
  options.num_scheduled = 2;
  EXPECT_EQ(flash_mla_gqa_attention(&args, &options, workspace, bytes), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("num_scheduled is 2, expected up to b = 1"),
            std::string::npos);
  std::free(workspace);
}

}  // namespace
}  // namespace flash_mla
