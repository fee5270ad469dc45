#pragma once

// The Hopper backend's side of flash_mla::dense_decode. Free of CUDA headers.

#include <cstddef>
#include <span>
#include <string>

#include "flash_mla/decode.h"

namespace flash_mla::sm90 {

/// Why device `index` cannot run this backend, or "" if it can.
std::string reject_reason(int index);
/// Name of device `index`.
std::string device_name(int index);

/// Parts a schedule for this problem should have: one per cluster of CTAs that runs at a time.
int num_parts(const DenseDecodeArgs& args);

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& args, const DecodeScheduleView& schedule);

/// Arguments have been checked but for what only this backend asks: see check_supported.
void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                  float softmax_scale, bool causal, void* stream);

/// Throws Unsupported or InvalidArgument for shapes, strides and devices the kernels do not take.
void check_supported(const DenseDecodeArgs& args, const DecodeScheduleView& schedule);

/// Plans on the device into schedule.parts and schedule.num_splits.
void build_schedule(const TensorView& cache_seqlens, const ScheduleOptions& options,
                    const DecodeScheduleView& schedule, void* stream);

}  // namespace flash_mla::sm90
