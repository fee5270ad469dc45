#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flash_mla::sm90 {

/// Where an expert is, as a rank that shares the experts with others sees it.
struct ExpertPlace {
  std::int32_t index = -1;  ///< among this rank's experts; -1: not here
  std::int32_t turn = 0;    ///< which of its replicas this rank's is
  std::int32_t replicas = 1;
};

/// The choices of experts that are this rank's: replicas take the tokens in turn.
struct LocalExperts {
  const std::int32_t* ids = nullptr;    ///< (tokens, experts_per_token), of all experts
  const ExpertPlace* places = nullptr;  ///< of all experts
  std::int32_t* out = nullptr;          ///< likewise: the index among this rank's experts, or -1
  std::int64_t tokens = 0;
  int experts_per_token = 0;
  bool by_turn =
      true;  ///< false: the first replica takes all, so that no token's depends on where it is in a step
};

/// Queues it.
cudaError_t local_experts(const LocalExperts& args, cudaStream_t stream);

}  // namespace flash_mla::sm90
