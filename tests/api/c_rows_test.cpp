// Norms, gates and rotations through the C ABI.

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "c_tensor.h"
#include "flash_mla/c_api.h"

namespace flash_mla {
namespace {

TEST(CRows, NormsInPlaceAndToE4m3) {
  std::vector<float> x{1, 3, -5, 7}, residual{2, 0, 8, -3}, weight{1, 2};
  std::vector<std::uint8_t> narrow(4);
  Tensor t_x(x.data(), DType::kFloat32, {2, 2}), t_r(residual.data(), DType::kFloat32, {2, 2}),
      t_w(weight.data(), DType::kFloat32, {2}), t_narrow(narrow.data(), DType::kUInt8, {2, 2});
  flash_mla_rms_norm_options options;
  flash_mla_rms_norm_options_init(&options);
  options.eps = 0;
  options.out_scale = 0.5f;
  ASSERT_EQ(flash_mla_add_rms_norm(&t_x.tensor, &t_r.tensor, &t_w.tensor, &t_x.tensor, &options),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(residual, (std::vector<float>{3, 3, 3, 4}));
  EXPECT_FLOAT_EQ(x[0], 1);
  EXPECT_FLOAT_EQ(x[1], 2);
  EXPECT_FLOAT_EQ(x[3], 8 / std::sqrt(12.5f));
  ASSERT_EQ(flash_mla_rms_norm(&t_r.tensor, &t_w.tensor, &t_narrow.tensor, &options), FLASH_MLA_OK)
      << flash_mla_last_error();
  // 1 and 2 in units of a half are 2 and 4, 0x40 and 0x48; 0.849 / 0.5 = 1.70 is nearest to 1.75, 2.263 / 0.5 to 4.5.
  EXPECT_EQ(narrow, (std::vector<std::uint8_t>{0x40, 0x48, 0x3E, 0x49}));
  EXPECT_EQ(flash_mla_rms_norm(&t_r.tensor, nullptr, &t_r.tensor, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "weight is NULL, expected a pointer");
}

TEST(CRows, Gates) {
  std::vector<float> gate_up{1, -2, 10, 100}, out(2);
  Tensor t_in(gate_up.data(), DType::kFloat32, {1, 4}), t_out(out.data(), DType::kFloat32, {1, 2});
  ASSERT_EQ(flash_mla_gated_activation(&t_in.tensor, &t_out.tensor, FLASH_MLA_SILU, 0, nullptr),
            FLASH_MLA_OK);
  EXPECT_NEAR(out[0], 10 / (1 + std::exp(-1.0)), 1e-5);
  EXPECT_NEAR(out[1], -200 / (1 + std::exp(2.0)), 1e-4);
  EXPECT_EQ(flash_mla_gated_activation(&t_in.tensor, &t_out.tensor, 3, 0, nullptr),
            FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "activation is 3, expected 0 to 2");
}

TEST(CRows, Rotations) {
  std::vector<float> x{1, 2, 3, 4}, out(4), table{0, 1, 1, 0};  // position 0: a quarter turn of pair 0
  std::vector<std::int32_t> positions{0};
  Tensor t_x(x.data(), DType::kFloat32, {1, 1, 4}), t_out(out.data(), DType::kFloat32, {1, 1, 4}),
      t_at(positions.data(), DType::kInt32, {1}), t_table(table.data(), DType::kFloat32, {1, 4});
  ASSERT_EQ(flash_mla_apply_rope(&t_x.tensor, &t_at.tensor, &t_table.tensor, &t_out.tensor, nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(out, (std::vector<float>{-3, 2, 1, 4}));
  flash_mla_rope_options options;
  flash_mla_rope_options_init(&options);
  options.interleaved = 1;
  ASSERT_EQ(flash_mla_apply_rope(&t_x.tensor, &t_at.tensor, &t_table.tensor, &t_out.tensor, &options),
            FLASH_MLA_OK);
  EXPECT_EQ(out, (std::vector<float>{-2, 1, 3, 4}));
  options.scaling = FLASH_MLA_ROPE_YARN;
  EXPECT_EQ(flash_mla_apply_rope(&t_x.tensor, &t_at.tensor, nullptr, &t_out.tensor, &options),
            FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "original_max_position is 0, expected >= 1");
}

TEST(CPages, AppendAndMerge) {
  std::vector<float> key{1, 2}, pool(8), out{1}, lse{0}, other{3}, other_lse{0};
  std::vector<std::int32_t> indptr{0, 2}, pages{1, 0}, last{1}, lengths(1), starts{0, 1}, sequence(1),
      position(1);
  Tensor t_key(key.data(), DType::kFloat32, {1, 1, 2}), t_pool(pool.data(), DType::kFloat32, {2, 2, 1, 2}),
      t_indptr(indptr.data(), DType::kInt32, {2}), t_pages(pages.data(), DType::kInt32, {2}),
      t_last(last.data(), DType::kInt32, {1}), t_lengths(lengths.data(), DType::kInt32, {1}),
      t_starts(starts.data(), DType::kInt32, {2}), t_sequence(sequence.data(), DType::kInt32, {1}),
      t_position(position.data(), DType::kInt32, {1});
  ASSERT_EQ(flash_mla_paged_seqlens(&t_indptr.tensor, &t_last.tensor, 2, &t_lengths.tensor), FLASH_MLA_OK);
  ASSERT_EQ(
      flash_mla_batch_positions(&t_starts.tensor, &t_lengths.tensor, &t_sequence.tensor, &t_position.tensor),
      FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(position[0], 2);
  flash_mla_page_append_args args{};
  args.key = &t_key.tensor;
  args.batch_indices = &t_sequence.tensor;
  args.positions = &t_position.tensor;
  args.page_indptr = &t_indptr.tensor;
  args.page_indices = &t_pages.tensor;
  args.k_cache = &t_pool.tensor;
  ASSERT_EQ(flash_mla_append_pages(&args, 0), FLASH_MLA_OK) << flash_mla_last_error();
  EXPECT_EQ(pool, (std::vector<float>{1, 2, 0, 0, 0, 0, 0, 0}));
  Tensor t_out(out.data(), DType::kFloat32, {1, 1, 1, 1}), t_lse(lse.data(), DType::kFloat32, {1, 1, 1}),
      t_other(other.data(), DType::kFloat32, {1, 1, 1, 1}),
      t_sum(other_lse.data(), DType::kFloat32, {1, 1, 1});
  ASSERT_EQ(flash_mla_merge_states_in_place(&t_out.tensor, &t_lse.tensor, &t_other.tensor, &t_sum.tensor,
                                            nullptr, FLASH_MLA_LSE_BASE_2, nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(out[0], 2);
  EXPECT_EQ(lse[0], 1);
}

}  // namespace
}  // namespace flash_mla
