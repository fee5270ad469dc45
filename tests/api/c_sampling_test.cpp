// Choices of tokens and experts through the C ABI.

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "c_tensor.h"
#include "flash_mla/c_api.h"

namespace flash_mla {
namespace {

TEST(CSampling, DrawsFiltersAndProbabilities) {
  std::vector<float> probs{0.1f, 0.2f, 0.3f, 0.4f, 0.4f, 0.3f, 0.2f, 0.1f}, out(8);
  std::vector<std::int32_t> tokens(2), top_k{1, 2};
  Tensor t_probs(probs.data(), DType::kFloat32, {2, 4}), t_out(out.data(), DType::kFloat32, {2, 4}),
      t_tokens(tokens.data(), DType::kInt32, {2}), t_k(top_k.data(), DType::kInt32, {2});
  flash_mla_sampling_options options;
  flash_mla_sampling_options_init(&options);
  options.probabilities = 1;
  options.seed = 3;
  flash_mla_sample_args args{};
  args.scores = &t_probs.tensor;
  args.options.top_k = &t_k.tensor;
  args.tokens = &t_tokens.tensor;
  ASSERT_EQ(flash_mla_sample_tokens(&args, &options), FLASH_MLA_OK) << flash_mla_last_error();
  EXPECT_EQ(tokens[0], 3);
  EXPECT_LT(tokens[1], 2);
  ASSERT_EQ(flash_mla_filter_tokens(&t_probs.tensor, &args.options, &t_out.tensor, &options), FLASH_MLA_OK);
  EXPECT_EQ(out[3], 1);
  EXPECT_FLOAT_EQ(out[4], 4.0f / 7);
  EXPECT_EQ(out[6], 0);
  ASSERT_EQ(flash_mla_token_probabilities(&t_probs.tensor, nullptr, &t_out.tensor, nullptr), FLASH_MLA_OK);
  EXPECT_NEAR(out[1] / out[0], std::exp(0.1), 1e-6);
  options.top_p = 2;
  EXPECT_EQ(flash_mla_sample_tokens(&args, &options), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_mla_last_error(), "top_p is 2, expected 0 to 1");
}

TEST(CSampling, Chains) {
  // The target is sure of token 1 and then of 0: the first draft is accepted, the second replaced.
  std::vector<float> draft{0, 1, 0, 1}, target{0, 1, 1, 0, 0.5f, 0.5f};
  std::vector<std::int32_t> drafts{1, 1}, tokens(3), emitted(1);
  Tensor t_draft(draft.data(), DType::kFloat32, {1, 2, 2}),
      t_target(target.data(), DType::kFloat32, {1, 3, 2}), t_drafts(drafts.data(), DType::kInt32, {1, 2}),
      t_tokens(tokens.data(), DType::kInt32, {1, 3}), t_emitted(emitted.data(), DType::kInt32, {1});
  flash_mla_speculative_args args{};
  args.draft_probs = &t_draft.tensor;
  args.draft_tokens = &t_drafts.tensor;
  args.target_probs = &t_target.tensor;
  args.tokens = &t_tokens.tensor;
  args.emitted = &t_emitted.tensor;
  ASSERT_EQ(flash_mla_speculative_sampling(&args, nullptr), FLASH_MLA_OK) << flash_mla_last_error();
  EXPECT_EQ(tokens, (std::vector<std::int32_t>{1, 0, -1}));
  EXPECT_EQ(emitted[0], 1);
}

TEST(CRouting, GroupsAndBias) {
  // Group 0 is worth more by its best two; expert 2 is the best of all and in the other group.
  std::vector<float> logits{1, 1, 2, -9}, bias{0, 0.1f, 0, 0}, weights(2);
  std::vector<std::int32_t> ids(2);
  Tensor t_logits(logits.data(), DType::kFloat32, {1, 4}), t_bias(bias.data(), DType::kFloat32, {4}),
      t_weights(weights.data(), DType::kFloat32, {1, 2}), t_ids(ids.data(), DType::kInt32, {1, 2});
  flash_mla_routing_options options;
  flash_mla_routing_options_init(&options);
  options.sigmoid = options.groups_by_best_two = options.normalise = 1;
  options.num_groups = 2;
  options.scale = 3;
  ASSERT_EQ(
      flash_mla_choose_experts(&t_logits.tensor, &t_bias.tensor, &t_ids.tensor, &t_weights.tensor, &options),
      FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_EQ(ids, (std::vector<std::int32_t>{1, 0}));
  EXPECT_FLOAT_EQ(weights[0], 1.5f);
  options.groups_kept = 3;
  EXPECT_EQ(flash_mla_choose_experts(&t_logits.tensor, nullptr, &t_ids.tensor, &t_weights.tensor, &options),
            FLASH_MLA_INVALID_ARGUMENT);
}

TEST(CMhc, PreAndPost) {
  // With fn and base of zeros pre is 1/2, post 1 and comb 1/n, but for what the epsilons add.
  std::vector<float> residual{2, 4, 6, 8}, fn(8 * 4), scale{1, 1, 1}, base(8), post(2), comb(4), input(2),
      x{1, 2}, out(4);
  Tensor t_residual(residual.data(), DType::kFloat32, {1, 2, 2}), t_fn(fn.data(), DType::kFloat32, {8, 4}),
      t_scale(scale.data(), DType::kFloat32, {3}), t_base(base.data(), DType::kFloat32, {8}),
      t_post(post.data(), DType::kFloat32, {1, 2}), t_comb(comb.data(), DType::kFloat32, {1, 2, 2}),
      t_input(input.data(), DType::kFloat32, {1, 2}), t_x(x.data(), DType::kFloat32, {1, 2}),
      t_out(out.data(), DType::kFloat32, {1, 2, 2});
  const flash_mla_mhc_weights weights{&t_fn.tensor, &t_scale.tensor, &t_base.tensor, nullptr};
  const flash_mla_mhc_mixes mixes{&t_post.tensor, &t_comb.tensor, &t_input.tensor};
  ASSERT_EQ(flash_mla_mhc_pre(&t_residual.tensor, &weights, &mixes, nullptr), FLASH_MLA_OK)
      << flash_mla_last_error();
  EXPECT_NEAR(input[0], 4, 1e-4);
  EXPECT_NEAR(input[1], 6, 1e-4);
  EXPECT_NEAR(post[1], 1, 1e-6);
  ASSERT_EQ(flash_mla_mhc_post(&t_x.tensor, &t_residual.tensor, &t_post.tensor, &t_comb.tensor, &t_out.tensor,
                               0, nullptr),
            FLASH_MLA_OK);
  EXPECT_NEAR(out[0], 5, 1e-4);
  EXPECT_NEAR(out[3], 8, 1e-4);
  flash_mla_mhc_options options;
  flash_mla_mhc_options_init(&options);
  ASSERT_EQ(flash_mla_mhc_post_pre(&t_x.tensor, &t_residual.tensor, &t_post.tensor, &t_comb.tensor,
                                   &t_residual.tensor, &weights, &mixes, &options),
            FLASH_MLA_OK);
  EXPECT_EQ(residual, out);
  EXPECT_NEAR(input[0], 5, 1e-4);
}

}  // namespace
}  // namespace flash_mla
