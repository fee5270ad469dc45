// How a GPU divides a step's chunks among launches of attention.

#include "model/device/cuda/chunk_groups.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/device/cuda/cuda_device.h"
#include "model/size.h"

namespace flash_mla::model {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

/// A step of `absorbed` tokens and chunks (new tokens, tokens with those before), each with pages 10 i, 10 i + 1, ...
Step step_of(std::int64_t absorbed, const std::vector<std::pair<std::int64_t, std::int64_t>>& chunks) {
  Step step;
  step.num_absorbed = absorbed;
  std::int64_t token = absorbed;
  for (std::size_t i = 0; i < chunks.size(); ++i) {
    Chunk chunk;
    chunk.first_token = token;
    chunk.num_tokens = chunks[i].first;
    chunk.seq_len = chunks[i].second;
    for (std::int64_t page = 0; page * kPageSize < chunk.seq_len; ++page) {
      chunk.pages.push_back(static_cast<std::int32_t>(10 * i) + static_cast<std::int32_t>(page));
    }
    token += chunk.num_tokens;
    step.chunks.push_back(std::move(chunk));
  }
  return step;
}

TEST(ChunkGroups, WithoutListsChunksGoTogetherWhileTheirKeysFit) {
  const ChunkGroups groups = group_chunks(step_of(3, {{20, 20}, {30, 100}, {50, 50}, {40, 500}}), 200);
  EXPECT_THAT(groups.listed, IsEmpty());
  ASSERT_EQ(groups.dense.size(), 2u);
  EXPECT_EQ(groups.dense[0].first_query, 0);
  EXPECT_EQ(groups.dense[0].num_queries, 100);
  EXPECT_EQ(groups.dense[0].num_keys, 170);
  EXPECT_THAT(groups.dense[0].query_starts, ElementsAre(0, 20, 50, 100));
  EXPECT_THAT(groups.dense[0].key_starts, ElementsAre(0, 20, 120, 170));
  EXPECT_THAT(groups.dense[0].tables, ElementsAre(0, 1, 3));
  EXPECT_THAT(groups.dense[0].pages, ElementsAre(0, 10, 11, 20));
  // One that is too long alone.
  EXPECT_EQ(groups.dense[1].first_query, 100);
  EXPECT_EQ(groups.dense[1].num_keys, 500);
}

TEST(ChunkGroups, TokensThatSeeMoreAreListed) {
  // Below 64 keys, across, exactly at them, behind them, and below again.
  const ChunkGroups groups =
      group_chunks(step_of(2, {{20, 20}, {50, 90}, {30, 64}, {17, 200}, {18, 60}}), 1000, 64);
  ASSERT_EQ(groups.dense.size(), 3u);
  EXPECT_EQ(groups.dense[0].first_query, 0);
  EXPECT_THAT(groups.dense[0].query_starts, ElementsAre(0, 20, 44));
  EXPECT_THAT(groups.dense[0].key_starts, ElementsAre(0, 20, 84));
  EXPECT_EQ(groups.dense[1].first_query, 70);  // behind the 26 queries of the second that are listed
  EXPECT_THAT(groups.dense[1].query_starts, ElementsAre(0, 30));
  EXPECT_THAT(groups.dense[1].key_starts, ElementsAre(0, 64));
  EXPECT_EQ(groups.dense[2].first_query, 117);
  EXPECT_THAT(groups.dense[2].key_starts, ElementsAre(0, 60));
  ASSERT_EQ(groups.listed.size(), 2u);
  EXPECT_EQ(groups.listed[0].first_token, 2 + 20 + 24);
  EXPECT_EQ(groups.listed[0].num_tokens, 26);
  EXPECT_EQ(groups.listed[0].seq_len, 90);
  EXPECT_THAT(groups.listed[0].pages, ElementsAre(10, 11));
  EXPECT_EQ(groups.listed[1].first_token, 2 + 100);
  EXPECT_EQ(groups.listed[1].num_tokens, 17);
}

TEST(ChunkGroups, EveryTokenIsInOnePlace) {
  for (const std::int64_t dense :
       {std::int64_t{0}, std::int64_t{1}, std::int64_t{64}, std::int64_t{300}, kAllDense}) {
    const Step step = step_of(5, {{20, 20}, {100, 150}, {30, 64}, {300, 300}, {17, 400}});
    const ChunkGroups groups = group_chunks(step, 256, dense);
    std::vector<int> times(467);
    for (const ChunkGroups::Dense& group : groups.dense) {
      EXPECT_EQ(group.query_starts.back(), group.num_queries);
      EXPECT_EQ(group.key_starts.back(), group.num_keys);
      for (std::int64_t i = 0; i < group.num_queries; ++i)
        ++times[static_cast<std::size_t>(group.first_query + i)];
    }
    for (const ChunkGroups::Listed& part : groups.listed) {
      for (std::int64_t i = 0; i < part.num_tokens; ++i)
        ++times[static_cast<std::size_t>(part.first_token - 5 + i)];
    }
    EXPECT_THAT(times, testing::Each(1)) << dense;
    EXPECT_EQ(groups.dense.empty(), dense == 0);
  }
}

checkpoint::ModelConfig v32() {
  return checkpoint::parse_config(R"({"model_type": "deepseek_v32", "vocab_size": 100, "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "q_lora_rank": 32, "n_routed_experts": null,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 4096, "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128})",
                                  "test");
}

TEST(CudaIndexer, SizesWithoutKernelsAreNamed) {
  const auto message = [](auto change) {
    checkpoint::ModelConfig c = v32();
    change(c);
    return why_no_cuda_indexer(c);
  };
  EXPECT_EQ(message([](auto&) {}), "");
  EXPECT_EQ(message([](auto& c) { c.index_topk = 0, c.kv_lora_rank = 32; }), "");
  EXPECT_THAT(message([](auto& c) { c.kv_lora_rank = 256; }),
              testing::HasSubstr("kv_lora_rank is 256, expected 512"));
  EXPECT_THAT(message([](auto& c) { c.qk_rope_head_dim = 32; }),
              testing::HasSubstr("qk_rope_head_dim is 32, expected 64"));
  EXPECT_THAT(message([](auto& c) { c.index_head_dim = 256; }),
              testing::HasSubstr("index_head_dim is 256, expected 64 or 128"));
  EXPECT_THAT(message([](auto& c) { c.index_topk = 5000; }),
              testing::HasSubstr("index_topk is 5000, expected at most 4096"));
}

TEST(CudaIndexer, PagesCountItsKeys) {
  checkpoint::ModelConfig c = v32();
  EXPECT_EQ(page_bytes(c, false), 64.0 * 4 * (1152 + 132));
  EXPECT_EQ(page_bytes(c, true), 64.0 * 4 * (656 + 132));
  c.shares_index = {false, true, true, false};
  EXPECT_EQ(page_bytes(c, true), 64.0 * (4 * 656 + 2 * 132));
}

}  // namespace
}  // namespace flash_mla::model
