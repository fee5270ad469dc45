#pragma once

// The choice of a token's experts by one warp. A lane holds the experts lane, lane + 32, ...

#include <cstdint>
#include <limits>

#include "kernels/moe/sm90/moe.h"

namespace flash_mla::sm90::choice {

constexpr unsigned kAll = ~0u;
constexpr int kMaxGroups = 32;

/// Whether the kernels take these arguments.
inline bool valid(const RouteArgs& p) {
  const Routing& r = p.routing;
  const bool groups = r.method == TopkMethod::kGreedy ||
                      (r.num_groups >= 1 && r.num_groups <= kMaxGroups && r.num_experts % r.num_groups == 0 &&
                       r.groups_kept >= 1 && r.groups_kept <= r.num_groups);
  return p.tokens >= 0 && r.num_experts >= 1 && r.num_experts <= kMaxExperts && r.experts_per_token >= 1 &&
         r.experts_per_token <= r.num_experts && r.shared_experts >= 0 &&
         r.experts_per_token + r.shared_experts <= kMaxExpertsPerToken && groups &&
         (p.tokens == 0 || (p.logits != nullptr && p.ids != nullptr && p.weights != nullptr));
}

/// Unsigned integers in the order of the floats, 0 below all of them. NaN has a place too: ids stay in range.
__device__ inline std::uint32_t order(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return max(bits ^ (bits >> 31 != 0 ? 0xFFFFFFFFu : 0x80000000u), 1u);
}

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, offset));
  return x;
}
__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  return x;
}

/// The lane's best key and its index among the warp's: the greatest key, of equals the least index.
__device__ inline int warp_best(std::uint32_t key, int index) {
  const std::uint32_t best = __reduce_max_sync(kAll, key);
  return static_cast<int>(__reduce_min_sync(kAll, key == best ? static_cast<unsigned>(index) : ~0u));
}

/// The groups that stay in the running, as bits. `choice` (num_experts) lies in shared memory. A power of two
/// of lanes looks at each group.
__device__ inline std::uint32_t keep_groups(const Routing& p, const float* choice, int lane) {
  const int size = p.num_experts / p.num_groups;
  const int lanes = 1 << (31 - __clz(32 / p.num_groups));
  const int group = lane / lanes, part = lane % lanes;
  float first = -std::numeric_limits<float>::infinity(), second = first;
  if (group < p.num_groups) {
    for (int i = part; i < size; i += lanes) {
      const float s = choice[group * size + i];
      second = fmaxf(second, fminf(first, s));
      first = fmaxf(first, s);
    }
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kAll, first, offset),
                other_second = __shfl_xor_sync(kAll, second, offset);
    second = fmaxf(fmaxf(second, other_second), fminf(first, other));
    first = fmaxf(first, other);
  }
  const float score = p.method == TopkMethod::kNoAuxTc ? first + second : first;
  std::uint32_t key = group < p.num_groups ? order(score) : 0;
  std::uint32_t kept = 0;
  for (int i = 0; i < p.groups_kept; ++i) {
    const int best = warp_best(key, group);
    kept |= 1u << best;
    if (group == best) key = 0;
  }
  return kept;
}

/// `scores` and `choice`: 32 * kPerLane floats of shared memory each, of this warp alone.
template <int kPerLane>
__device__ void choose_token(const RouteArgs& p, std::int64_t token, float* scores, float* choice) {
  const int lane = threadIdx.x % 32;
  constexpr float kLowest = -std::numeric_limits<float>::infinity();

  float value[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = i * 32 + lane;
    value[i] = e < p.routing.num_experts ? __ldcg(p.logits + token * p.routing.num_experts + e) : kLowest;
  }
  if (p.routing.scoring == ScoringFunc::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) value[i] = 1.0f / (1.0f + expf(-value[i]));
  } else {
    float highest = kLowest, sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) highest = fmaxf(highest, value[i]);
    highest = warp_max(highest);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum += value[i] = expf(value[i] - highest);
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) value[i] /= sum;
  }
  std::uint32_t keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = i * 32 + lane;
    scores[e] = value[i];
    if (p.correction != nullptr && e < p.routing.num_experts) value[i] += p.correction[e];
    choice[e] = value[i];
    keys[i] = e < p.routing.num_experts ? order(value[i]) : 0;
  }
  __syncwarp();
  if (p.routing.method != TopkMethod::kGreedy) {
    const std::uint32_t kept = keep_groups(p.routing, choice, lane);
    const int size = p.routing.num_experts / p.routing.num_groups;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * 32 + lane;
      if (e < p.routing.num_experts && !(kept >> e / size & 1)) keys[i] = order(kLowest);
    }
  }

  int chosen = 0;  // lane i keeps the i-th choice
  for (int i = 0; i < p.routing.experts_per_token; ++i) {
    std::uint32_t best = keys[0];
    int index = lane;
#pragma unroll
    for (int j = 1; j < kPerLane; ++j) {
      if (keys[j] > best) {
        best = keys[j];
        index = j * 32 + lane;
      }
    }
    const int winner = warp_best(best, index);
    if (lane == i) chosen = winner;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (winner == j * 32 + lane) keys[j] = 0;
    }
  }
  const float weight = scores[chosen];
  float sum = 0;
  for (int i = 0; i < p.routing.experts_per_token; ++i) sum += __shfl_sync(kAll, weight, i);
  const int width = p.routing.experts_per_token + p.routing.shared_experts;
  if (lane < width) {
    const bool shared_one = lane >= p.routing.experts_per_token;
    const std::int64_t at = token * width + lane;
    p.ids[at] = shared_one ? p.routing.num_experts + lane - p.routing.experts_per_token : chosen;
    p.weights[at] =
        shared_one ? 1.0f : (p.routing.normalise ? weight / (sum + 1e-20f) : weight) * p.routing.scale;
    if (p.counts != nullptr && !shared_one && p.slots[token] >= 0) atomicAdd(p.counts + chosen, 1ull);
  }
}

}  // namespace flash_mla::sm90::choice
