#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "model/device/cuda/memory.h"
#include "model/step.h"

namespace flash_mla::model {

/// A step's metadata on the device. Where each array lies depends on the step's shape alone, so that a
/// recorded step finds that of the next one of its shape in the same place.
struct StepData {
  const std::int32_t* token_ids = nullptr;
  const std::int32_t* positions = nullptr;
  const std::int64_t* slots = nullptr;
  const std::int32_t* logit_rows = nullptr;
  const Draw* draws = nullptr;    ///< of the logit rows, if the step has any
  std::int32_t* lens = nullptr;   ///< of the absorbed tokens
  std::int32_t* table = nullptr;  ///< (num_absorbed, max_blocks)
  std::int64_t max_blocks = 0;    ///< those of the step, rounded up to a power of two

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
};

/// Packs metadata into page-locked memory and sends it to the device in one copy.
class StepUploader {
 public:
  StepUploader();
  ~StepUploader();
  StepUploader(const StepUploader&) = delete;
  StepUploader& operator=(const StepUploader&) = delete;

  /// Groups of chunks have up to `most_keys` keys, or one chunk.
  StepData upload(const Step& step, std::int64_t most_keys, DevicePool& pool, cudaStream_t stream);

 private:
  class Packer;

  PinnedBuffer host_;
  Buffer device_;
  cudaEvent_t sent_ = nullptr;  // the last copy has read host_
};

}  // namespace flash_mla::model
