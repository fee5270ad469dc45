#include "model/device/cuda/step_data.h"

#include <algorithm>
#include <bit>

namespace flash_mla::model {
namespace {

constexpr std::int64_t kFewestBlocks = 16;

// Keys that each token of the step attends to, of at most `most`: none, if it only fills the step up.
void write_attended(const Step& step, std::int64_t most, std::int32_t* to) {
  for (std::int64_t i = 0; i < step.num_tokens(); ++i) {
    const auto token = static_cast<std::size_t>(i);
    const std::int64_t length = i < step.num_absorbed ? step.absorbed_lens[token] : step.positions[token] + 1;
    to[i] = static_cast<std::int32_t>(std::min(length, most));
  }
}

}  // namespace

StepData StepUploader::upload(const Step& step, const StepCut& cut, DevicePool& pool, cudaStream_t stream) {
  const ChunkGroups chunks = group_chunks(step, cut.most_keys, cut.dense_keys);
  StepData data;
  data.max_blocks = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max(step.max_blocks, kFewestBlocks))));
  for (const ChunkGroups::Dense& group : chunks.dense) {
    StepData::Group& out = data.groups.emplace_back();
    out.first_query = group.first_query;
    out.num_queries = group.num_queries;
    out.num_keys = group.num_keys;
    out.num_seqs = static_cast<int>(group.tables.size());
  }
  for (const ChunkGroups::Listed& part : chunks.listed) {
    StepData::Listed& out = data.listed.emplace_back();
    out.first_token = part.first_token;
    out.num_tokens = part.num_tokens;
    out.num_pages = std::ssize(part.pages);
  }
  const auto pack = [&](Packer& packer) {
    data.token_ids = packer.place(step.token_ids);
    data.positions = packer.place(step.positions);
    data.slots = packer.place(step.slots);
    data.logit_rows = packer.place(step.logit_rows);
    data.states = packer.place(step.states);
    data.draws = packer.place(step.draws);
    data.lens = packer.place(step.absorbed_lens);
    data.request_lens = data.lens;
    if (const std::int64_t each = cut.tokens_per_request; each > 1) {
      const auto requests = static_cast<std::size_t>(step.num_absorbed / each);
      data.request_lens = packer.place<std::int32_t>(requests, [&](auto* to) {
        for (std::size_t i = 0; i < requests; ++i) {
          to[i] = step.absorbed_lens[(i + 1) * static_cast<std::size_t>(each) - 1];
        }
      });
    }
    data.table = packer.place<std::int32_t>(
        static_cast<std::size_t>(step.num_absorbed * data.max_blocks), [&](auto* to) {
          const auto* from = step.absorbed_table.data();
          for (std::int64_t i = 0; i < step.num_absorbed; ++i) {
            std::copy_n(from + i * step.max_blocks, step.max_blocks, to + i * data.max_blocks);
          }
        });
    for (std::size_t i = 0; i < chunks.dense.size(); ++i) {
      data.groups[i].query_starts = packer.place(chunks.dense[i].query_starts);
      data.groups[i].key_starts = packer.place(chunks.dense[i].key_starts);
      data.groups[i].tables = packer.place(chunks.dense[i].tables);
      data.groups[i].pages = packer.place(chunks.dense[i].pages);
    }
    if (cut.index_topk > 0) {
      data.attended_lens =
          packer.place<std::int32_t>(static_cast<std::size_t>(step.num_tokens()),
                                     [&](auto* to) { write_attended(step, cut.index_topk, to); });
    }
    for (std::size_t i = 0; i < chunks.listed.size(); ++i) {
      data.listed[i].seq_len =
          packer.place<std::int32_t>(1, [&](auto* to) { *to = chunks.listed[i].seq_len; });
      data.listed[i].pages = packer.place(chunks.listed[i].pages);
    }
  };
  upload_.send(pool, stream, pack);
  return data;
}

}  // namespace flash_mla::model
