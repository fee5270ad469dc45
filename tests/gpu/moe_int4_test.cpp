// Experts with weights of 4 bits against fp64 sums on the host.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "experts.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/moe/sm90/moe.h"
#include "model_data.h"

namespace flash_mla::gpu_test {
namespace {

using sm90::ExpertFfn;

// Few pairs for each expert, many, and a favourite of all tokens beside experts that nobody takes; the last shape is not
// for the fast path.
TEST(Int4ExpertFfn, SmallAndOddShapes) {
  Random random(71);
  for (const Layer layer : {Layer{64, 48, 8, 2}, Layer{144, 80, 5, 3}, Layer{256, 144, 16, 4},
                            Layer{16, 16, 1, 1}, Layer{336, 272, 300, 8}, Layer{72, 40, 5, 3}}) {
    for (const int tokens : {1, 2, 7, 40, 333, 2000}) {
      for (const int favourite : {-1, layer.experts - 1}) {
        Experts e(random, layer, tokens, favourite, tokens % 2 == 0 ? 16 : 0);
        const Int4Experts weights(random, e);
        e.args.programmatic_launch = random.coin();
        e.args.batch_invariant = random.coin();
        e.verify(e.run(e.args), some_tokens(random, tokens, 20),
                 (testing::Message() << "hidden " << layer.hidden << " tokens " << tokens).GetString());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Every number of rows, by every kernel that takes them; where there are few, some experts are taken by nobody.
TEST(Int4ExpertFfn, EveryRowCount) {
  Random random(73);
  for (int tokens = 1; tokens <= 300; ++tokens) {
    Experts e(random, {272, 144, 6, 2}, tokens, tokens % 3 == 0 ? 2 : -1);
    const Int4Experts weights(random, e);
    e.args.programmatic_launch = true;
    e.verify(e.run(e.args), some_tokens(random, tokens, 6),
             (testing::Message() << "tokens " << tokens).GetString());
    if (HasFatalFailure()) return;
  }
}

TEST(Int4ExpertFfn, V2Lite) {
  Random random(79);
  for (const int tokens : {1, 3, 32, 128}) {
    Experts e(random, {2048, 1408, 12, 6}, tokens);
    const Int4Experts weights(random, e);
    e.args.programmatic_launch = true;
    e.verify(e.run(e.args), some_tokens(random, tokens, 3),
             (testing::Message() << "tokens " << tokens).GetString());
    if (HasFatalFailure()) return;
  }
}

// Tiles of 128 rows multiply by what is rounded to bfloat16: the bits of the same weights stored so.
TEST(Int4ExpertFfn, TilesHaveTheBitsOfBfloat16) {
  Random random(83);
  for (const Layer layer : {Layer{2048, 1408, 12, 6}, Layer{512, 384, 4, 2}, Layer{208, 112, 3, 2}}) {
    for (const int tokens : {120, 333, 1500}) {
      Experts e(random, layer, tokens);
      const ExpertFfn bf16 = e.args;
      const Int4Experts weights(random, e);
      e.gate_up_device.upload(e.gate_up);
      e.down_device.upload(e.down);
      EXPECT_EQ(e.run(e.args), e.run(bf16)) << "hidden " << layer.hidden << " tokens " << tokens;
    }
  }
}

TEST(Int4ExpertFfn, BatchInvariantTokens) {
  Random random(89);
  constexpr int kAll = 700;
  Experts e(random, {512, 384, 16, 4}, kAll);
  const Int4Experts weights(random, e);
  e.args.batch_invariant = true;
  const std::vector<std::uint16_t> want = e.run(e.args);
  for (const int tokens : {1, 2, 9, 40, 100, 350}) {
    const int first = random.below(kAll - tokens + 1);
    ExpertFfn part = e.args;
    part.tokens = tokens;
    part.x = e.x_device.get() + std::int64_t(first) * part.x_stride;
    part.inout = e.inout.get() + std::int64_t(first) * part.inout_stride;
    part.ids += std::int64_t(first) * part.experts_per_token;
    part.weights += std::int64_t(first) * part.experts_per_token;
    const std::vector<std::uint16_t> got = e.run(part);
    for (int i = 0; i < tokens * 512; ++i) {
      const std::size_t at = std::size_t(first) * 512 + std::size_t(i);
      ASSERT_EQ(got[at], want[at]) << "tokens " << tokens << " element " << i;
    }
  }
}

TEST(Int4ExpertFfn, RefusesWhatItCannotRead) {
  Random random(97);
  Experts e(random, {64, 48, 8, 2}, 3);
  const Int4Experts weights(random, e);
  ExpertFfn without = e.args;
  without.gate_up_scales = without.down_scales = nullptr;
  EXPECT_EQ(sm90::expert_ffn(without, nullptr), cudaErrorInvalidValue);
  ExpertFfn odd = e.args;
  odd.intermediate = 44;
  EXPECT_EQ(sm90::expert_ffn(odd, nullptr), cudaErrorInvalidValue);
}

TEST(Int4Weights, MadeUpCodesAreEven) {
  constexpr std::int64_t kWords = 100'003;
  OnDevice<std::uint32_t> words(std::size_t{kWords});
  check(sm90::fill_random_int4(words.get(), kWords, 5, nullptr), "fill_random_int4");
  std::vector<double> count(16);
  for (const std::uint32_t word : words.host()) {
    for (int i = 0; i < 8; ++i) ++count[word >> (4 * i) & 15u];
  }
  EXPECT_EQ(count[0], 0);
  for (std::size_t code = 1; code < 16; ++code) EXPECT_NEAR(count[code] / (8 * kWords), 1.0 / 15, 0.01);
  EXPECT_EQ(sm90::fill_random_int4(nullptr, 1, 5, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(sm90::fill_random_int4(words.get(), -1, 5, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace flash_mla::gpu_test
