#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "kernels/sampling/sm90/token_rules.h"
#include "kernels/sampling/token_rule.h"
#include "model/device/cuda/packed_upload.h"

namespace flash_mla::model {

/// Sends the rules of a masked step's rows to the device, those that change anything.
class RuleUploader {
 public:
  /// Makes room for masks of that many rows.
  void reserve(std::int64_t rows, std::int64_t vocab_size, DevicePool& pool);
  /// `rules`: of the logit rows from `first` on. The result holds until the next upload.
  sm90::TokenRules upload(std::int64_t first, std::span<const TokenRule> rules, std::int64_t vocab_size,
                          DevicePool& pool, cudaStream_t stream);

 private:
  PackedUpload upload_;
};

}  // namespace flash_mla::model
