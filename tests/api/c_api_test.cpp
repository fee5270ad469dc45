#include "flash_mla/c_api.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "flash_mla/dlpack.h"

extern "C" int header_is_c99(void);

namespace flash_mla {
namespace {

// A decode call over the C ABI: one request, two heads, all keys alike.
struct Call {
  std::vector<float> q = std::vector<float>(2 * 576, 0.5f), cache = std::vector<float>(2 * 16 * 576, 0.25f),
                     out = std::vector<float>(2 * 512, NAN), lse = std::vector<float>(2, NAN);
  std::vector<std::int32_t> table{1}, lengths{7}, parts = std::vector<std::int32_t>(16), splits{0, 0};
  TensorView views[8] = {TensorView::contiguous(q.data(), DType::kFloat32, {1, 1, 2, 576}),
                         TensorView::contiguous(cache.data(), DType::kFloat32, {2, 16, 1, 576}),
                         TensorView::contiguous(table.data(), DType::kInt32, {1, 1}),
                         TensorView::contiguous(lengths.data(), DType::kInt32, {1}),
                         TensorView::contiguous(out.data(), DType::kFloat32, {1, 1, 2, 512}),
                         TensorView::contiguous(lse.data(), DType::kFloat32, {1, 2, 1}),
                         TensorView::contiguous(parts.data(), DType::kInt32, {2, 8}),
                         TensorView::contiguous(splits.data(), DType::kInt32, {2})};
  DLTensor t[8];
  flash_mla_dense_decode_args args;
  Call() {
    for (int i = 0; i < 8; ++i) t[i] = to_dlpack(views[i]);
    args = {&t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]};
  }
};

TEST(CApi, PlansAndDecodes) {
  EXPECT_EQ(header_is_c99(), 0);
  EXPECT_STREQ(flash_mla_version(), "0.1.0");
  Call c;
  ASSERT_EQ(flash_mla_build_decode_schedule(&c.t[3], nullptr, &c.t[6], &c.t[7]), FLASH_MLA_OK);
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_dense_decode_workspace_size(&c.args, nullptr, &bytes), FLASH_MLA_OK);
  void* workspace = std::aligned_alloc(64, bytes);
  flash_mla_dense_decode_options options;
  flash_mla_dense_decode_options_init(&options);
  EXPECT_TRUE(std::isnan(options.softmax_scale));
  ASSERT_EQ(flash_mla_dense_decode(&c.args, &options, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_NEAR(c.out[1023], 0.25f, 1e-6);
  EXPECT_NEAR(c.lse[1], 576 * 0.125 / 24 + std::log(7.0), 1e-4);
  EXPECT_EQ(flash_mla_dense_decode(&c.args, &options, workspace, bytes - 1), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("workspace_bytes"), std::string::npos);
  std::free(workspace);
}

TEST(CApi, NullIsAnErrorEverywhere) {
  Call c;
  std::size_t bytes = 0;
  EXPECT_EQ(flash_mla_build_decode_schedule(nullptr, nullptr, &c.t[6], &c.t[7]), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_build_decode_schedule(&c.t[3], nullptr, nullptr, &c.t[7]), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_build_decode_schedule(&c.t[3], nullptr, &c.t[6], nullptr), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_dense_decode(nullptr, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_EQ(flash_mla_dense_decode_workspace_size(&c.args, nullptr, nullptr), FLASH_MLA_INVALID_ARGUMENT);
  flash_mla_schedule_options_init(nullptr);
  flash_mla_dense_decode_options_init(nullptr);
  const DLTensor* flash_mla_dense_decode_args::*const inputs[] = {
      &flash_mla_dense_decode_args::q,           &flash_mla_dense_decode_args::k_cache,
      &flash_mla_dense_decode_args::block_table, &flash_mla_dense_decode_args::cache_seqlens,
      &flash_mla_dense_decode_args::parts,       &flash_mla_dense_decode_args::num_splits};
  for (const auto member : inputs) {
    flash_mla_dense_decode_args args = c.args;
    args.*member = nullptr;
    EXPECT_EQ(flash_mla_dense_decode_workspace_size(&args, nullptr, &bytes), FLASH_MLA_INVALID_ARGUMENT);
    EXPECT_NE(std::string(flash_mla_last_error()).find("NULL"), std::string::npos);
  }
  flash_mla_dense_decode_args args = c.args;
  args.out = nullptr;
  EXPECT_EQ(flash_mla_dense_decode_workspace_size(&args, nullptr, &bytes), FLASH_MLA_INVALID_ARGUMENT);
  args = c.args;
  args.lse = nullptr;
  EXPECT_EQ(flash_mla_dense_decode_workspace_size(&args, nullptr, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(flash_mla_merge_states(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, FLASH_MLA_LSE_BASE_E,
                                   nullptr),
            FLASH_MLA_INVALID_ARGUMENT);
}

TEST(CApi, MergesInPlace) {
  Call a, b;
  std::fill(a.out.begin(), a.out.end(), 1.0f);
  std::fill(b.out.begin(), b.out.end(), 3.0f);
  a.lse = {0, 0};
  b.lse = {0, INFINITY};
  a.views[5].data = a.lse.data();
  b.views[5].data = b.lse.data();
  a.t[5] = to_dlpack(a.views[5]);
  b.t[5] = to_dlpack(b.views[5]);
  ASSERT_EQ(flash_mla_merge_states(&a.t[4], &a.t[5], &b.t[4], &b.t[5], &a.t[4], &a.t[5], FLASH_MLA_LSE_BASE_2,
                                   nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_FLOAT_EQ(a.out[0], 2);
  EXPECT_FLOAT_EQ(a.lse[0], 1);
  EXPECT_FLOAT_EQ(a.out[512], 1);
  EXPECT_EQ(flash_mla_merge_states(&a.t[4], &a.t[5], &b.t[4], &b.t[5], &a.t[4], &a.t[5],
                                   static_cast<flash_mla_lse_base>(7), nullptr),
            FLASH_MLA_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace flash_mla
