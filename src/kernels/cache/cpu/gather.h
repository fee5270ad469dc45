#pragma once

#include "flash_mla/kv_cache.h"

namespace flash_mla::cpu {

/// flash_mla::gather_kv on checked arguments. num_threads 0: as many as OpenMP would use.
void gather_kv(const KvGatherArgs& args, int num_threads);

}  // namespace flash_mla::cpu
