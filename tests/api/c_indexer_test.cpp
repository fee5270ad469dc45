// The indexer and the selection through the C ABI: from keys to the slots that a query attends to.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "flash_mla/c_api.h"
#include "flash_mla/dlpack.h"

namespace flash_mla {
namespace {

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

TEST(CIndexer, FromKeysToSlots) {
  // Six keys in pages of 4, the first request's pages being 2 and 0; key i is i times the query.
  constexpr int kDim = 64, kKeys = 6, kHeads = 2;
  std::vector<float> keys, queries(kHeads * kDim), weights(kHeads, 0.5f), scaled(kHeads, NAN);
  for (int d = 0; d < kDim; ++d) {
    queries[static_cast<std::size_t>(d)] = queries[static_cast<std::size_t>(kDim + d)] =
        d % 2 == 0 ? 1.0f : -0.5f;
  }
  for (int i = 0; i < kKeys; ++i) {
    for (int d = 0; d < kDim; ++d)
      keys.push_back(static_cast<float>(i) * queries[static_cast<std::size_t>(d)]);
  }
  std::vector<std::int64_t> slots{8, 9, 10, 11, 0, 1};
  std::vector<std::uint8_t> cache(3 * 4 * (kDim + 4), 0xFF), values(kHeads * kDim);
  Tensors t;
  DLTensor* pool = t.add(cache.data(), DType::kUInt8, {3, 4, 1, kDim + 4});
  ASSERT_EQ(flash_mla_append_index_keys(t.add(keys.data(), DType::kFloat32, {kKeys, kDim}),
                                        t.add(slots.data(), DType::kInt64, {kKeys}), pool,
                                        FLASH_MLA_FP8_INDEXER_POW2, 1, 1, nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();
  ASSERT_EQ(flash_mla_quantise_index_queries(t.add(queries.data(), DType::kFloat32, {1, kHeads, kDim}),
                                             t.add(weights.data(), DType::kFloat32, {1, kHeads}), 1.0f,
                                             FLASH_MLA_FP8_INDEXER_POW2, 1,
                                             t.add(values.data(), DType::kUInt8, {1, kHeads, kDim}),
                                             t.add(scaled.data(), DType::kFloat32, {1, kHeads}), 1, nullptr),
            FLASH_MLA_OK)
      << flash_mla_last_error();

  std::vector<std::int32_t> context{kKeys}, table{2, 0}, chosen(3, -7);
  std::vector<float> logits(8, NAN);
  flash_mla_paged_mqa_logits_args args{};
  args.q = t.add(values.data(), DType::kUInt8, {1, 1, kHeads, kDim});
  args.weights = t.add(scaled.data(), DType::kFloat32, {1, kHeads});
  args.cache = pool;
  args.context_lens = t.add(context.data(), DType::kInt32, {1});
  args.block_table = t.add(table.data(), DType::kInt32, {1, 2});
  args.logits = t.add(logits.data(), DType::kFloat32, {1, 8});
  args.clean = 1;
  std::size_t bytes = 0;
  ASSERT_EQ(flash_mla_paged_mqa_logits_workspace_size(&args, 1, nullptr, &bytes), FLASH_MLA_OK);
  void* workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  ASSERT_EQ(flash_mla_paged_mqa_logits(&args, 1, nullptr, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  std::free(workspace);
  for (int i = 0; i < kKeys; ++i) {
    // Two heads of weight 1/2, each i * (32 + 8); the rotation changes products by rounding alone.
    EXPECT_NEAR(logits[static_cast<std::size_t>(i)], 40.0f * static_cast<float>(i),
                1.5f * static_cast<float>(i));
  }
  EXPECT_EQ(logits[6], -INFINITY);

  args.logits = nullptr;
  flash_mla_top_k_output output{};
  output.block_table = args.block_table;
  output.page_size = 4;
  DLTensor* indices = t.add(chosen.data(), DType::kInt32, {1, 3});
  ASSERT_EQ(flash_mla_paged_mqa_top_k_workspace_size(&args, &output, indices, nullptr, &bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  workspace = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  ASSERT_EQ(flash_mla_paged_mqa_top_k(&args, &output, indices, nullptr, workspace, bytes), FLASH_MLA_OK)
      << flash_mla_last_error();
  std::free(workspace);
  EXPECT_EQ(chosen, (std::vector<std::int32_t>{11, 0, 1}));  // positions 3, 4 and 5
}

TEST(CIndexer, TopKNamesWhatIsWrong) {
  std::vector<float> scores{3, 1, 2, 5};
  std::vector<std::int32_t> lengths{4}, chosen(2, -7);
  Tensors t;
  flash_mla_top_k_args args{};
  args.logits = t.add(scores.data(), DType::kFloat32, {1, 4});
  args.lengths = t.add(lengths.data(), DType::kInt32, {1});
  args.indices = t.add(chosen.data(), DType::kInt32, {1, 2});
  std::size_t bytes = 1;
  ASSERT_EQ(flash_mla_top_k_workspace_size(&args, 0, nullptr, &bytes), FLASH_MLA_OK);
  EXPECT_EQ(bytes, 0u);
  ASSERT_EQ(flash_mla_top_k(&args, 0, nullptr, nullptr, 0), FLASH_MLA_OK) << flash_mla_last_error();
  EXPECT_EQ(chosen, (std::vector<std::int32_t>{0, 3}));
  lengths[0] = 5;
  EXPECT_EQ(flash_mla_top_k(&args, 0, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  EXPECT_NE(std::string(flash_mla_last_error()).find("lengths[0] is 5, expected 0 to 4"), std::string::npos);
  EXPECT_EQ(flash_mla_top_k(nullptr, 0, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
  args.lengths = nullptr;
  EXPECT_EQ(flash_mla_top_k(&args, 0, nullptr, nullptr, 0), FLASH_MLA_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace flash_mla
