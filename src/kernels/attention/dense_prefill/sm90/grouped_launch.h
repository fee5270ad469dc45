#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/attention/dense_prefill/sm90/params.h"

namespace flash_mla::sm90::prefill {

struct GroupedLaunch {
  CUtensorMap q, k, v;
  GroupedParams params;
  bool bf16;
  std::int64_t max_items;
  int sms;
  void* stream;
};

/// Defined for the head dimensions that grouped_prefill_takes names.
template <int kDqk, int kDv>
void launch_grouped(const GroupedLaunch& call);

}  // namespace flash_mla::sm90::prefill
