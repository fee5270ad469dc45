#pragma once

#include "flash_mla/kv_cache.h"

namespace flash_mla::cpu {

/// flash_mla::append_kv on checked arguments. num_threads 0: as many as OpenMP would use.
void append_kv(const KvAppendArgs& args, int num_threads);

}  // namespace flash_mla::cpu
