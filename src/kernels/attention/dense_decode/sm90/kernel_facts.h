#pragma once

// What the compiler made of the kernels. Implemented by decode/launch.cu, or by not_built.cpp in a build
// without CUDA, where nothing is known.

#include <cstddef>

#include "flash_mla/export.h"
#include "kernels/attention/dense_decode/sm90/plan.h"

namespace flash_mla::sm90 {

/// 0: not known, which is what registers are without a GPU.
struct KernelFacts {
  int threads = 0;             ///< of a block
  std::size_t smem_bytes = 0;  ///< dynamic shared memory
  int registers = 0;           ///< of a thread at the start
  std::size_t spill_bytes = 0;
};

FLASH_MLA_API KernelFacts decode_kernel_facts(const DecodePlan& plan, bool bf16);
FLASH_MLA_API KernelFacts combine_kernel_facts(const DecodePlan& plan, bool bf16);

}  // namespace flash_mla::sm90
