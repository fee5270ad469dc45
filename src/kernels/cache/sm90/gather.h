#pragma once

#include "flash_mla/kv_cache.h"

namespace flash_mla::sm90 {

/// flash_mla::gather_kv on checked arguments of one CUDA device, queued on `stream`. Throws Unsupported where the
/// device is none that this backend runs on. Implemented by gather.cu, or by dense_decode/sm90/not_built.cpp
/// in a build without CUDA.
void gather_kv(const KvGatherArgs& args, void* stream);

}  // namespace flash_mla::sm90
