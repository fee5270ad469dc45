#pragma once

// Dense decode over FP8 caches on Hopper, as the public API calls it. Free of CUDA headers. Implemented by
// dense_fp8_decode.cpp, or by not_built.cpp in a build without CUDA.

#include <cstddef>

#include "flash_mla/dense_fp8.h"

namespace flash_mla::sm90 {

/// Throws Unsupported or InvalidArgument for formats, shapes, strides and devices that the kernels do not take.
void check_supported(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule);

std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs& args,
                                            const DecodeScheduleView& schedule);

/// Arguments have been checked but for what only this backend asks: see check_supported.
void dense_fp8_decode(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                      float softmax_scale, bool causal, void* stream);

}  // namespace flash_mla::sm90
