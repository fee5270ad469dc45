#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "model/device/cuda/chunk_groups.h"
#include "model/device/cuda/packed_upload.h"
#include "model/step.h"

namespace flash_mla::model {

/// A step's metadata on the device. Where each array lies depends on the step's shape alone, so that a
/// recorded step finds that of the next one of its shape in the same place.
struct StepData {
  const std::int32_t* token_ids = nullptr;
  const std::int32_t* positions = nullptr;
  const std::int64_t* slots = nullptr;
  const std::int32_t* logit_rows = nullptr;
  const std::int32_t* states = nullptr;  ///< Step::states
  const Draw* draws = nullptr;           ///< of the logit rows, if the step has any
  std::int32_t* lens = nullptr;          ///< of the absorbed tokens
  std::int32_t* table = nullptr;         ///< (num_absorbed, max_blocks)
  std::int32_t* request_lens =
      nullptr;                  ///< of every StepCut::tokens_per_request absorbed tokens the last one's
  std::int64_t max_blocks = 0;  ///< those of the step, rounded up to a power of two

  /// Chunks that prefill attention takes together: their queries lie behind one another.
  struct Group {
    std::int64_t first_query = 0;  ///< behind the absorbed tokens
    std::int64_t num_queries = 0, num_keys = 0;
    int num_seqs = 0;
    const std::int32_t* query_starts = nullptr;  ///< (num_seqs + 1), the first 0
    const std::int32_t* key_starts = nullptr;    ///< (num_seqs + 1), the first 0
    const std::int32_t* tables = nullptr;        ///< (num_seqs): first page of each in `pages`
    const std::int32_t* pages = nullptr;
  };
  std::vector<Group> groups;

  // Of models with an indexer.
  /// (tokens): keys that a token attends to, at most index_topk.
  const std::int32_t* attended_lens = nullptr;
  /// Tokens of a chunk that attend to those that the indexer chose.
  struct Listed {
    std::int64_t first_token = 0, num_tokens = 0;
    const std::int32_t* seq_len = nullptr;  ///< (1): keys that the last of them sees
    const std::int32_t* pages = nullptr;
    std::int64_t num_pages = 0;
  };
  std::vector<Listed> listed;
};

/// What the device makes of a step's chunks and lengths.
struct StepCut {
  std::int64_t most_keys = 0;           ///< of a group of chunks, unless it is one chunk
  std::int64_t dense_keys = kAllDense;  ///< as group_chunks has it
  std::int64_t index_topk = 0;          ///< 0: there is no indexer
  /// Of the absorbed tokens, which attend as requests of as many.
  std::int64_t tokens_per_request = 1;
};

/// Sends a step's metadata to the device.
class StepUploader {
 public:
  StepData upload(const Step& step, const StepCut& cut, DevicePool& pool, cudaStream_t stream);

 private:
  PackedUpload upload_;
};

}  // namespace flash_mla::model
