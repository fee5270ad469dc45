#pragma once

// The Hopper backend's side of the public API. Free of CUDA headers. Implemented by dense_decode.cpp, or by
// not_built.cpp in a build without CUDA.

#include <cstddef>
#include <string>
#include <vector>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/dense_decode/sm90/plan.h"

namespace flash_mla::sm90 {

struct Gpu {
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  int sms = 0;
  std::size_t memory_bytes = 0;
};

// These two are exported for the engine, which is a library of its own.

/// The CUDA devices of this machine, by index. Never fails: without a GPU or a driver there are none.
FLASH_MLA_API std::vector<Gpu> gpus();
/// Why there are none, or "".
FLASH_MLA_API std::string why_no_gpus();
/// Why a device cannot run this backend, or "" if it can.
std::string reject_reason(const Gpu& gpu);
/// Throws Unsupported if there is no such device or it cannot run this backend, InvalidArgument for a device
/// index beyond those there are.
void require_device(int index);

/// How a schedule should cut a batch of these shapes; `batch` 0: not known.
ScheduleOptions schedule_options(int device, int s_q, int h_q, int h_kv, int batch);

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
