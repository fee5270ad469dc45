#pragma once

#include <string_view>

#include "flash_mla/info.h"
#include "kernels/attention/dense_decode/cpu/tile.h"

namespace flash_mla::cpu {

/// What is selected and why. Throws InvalidArgument when FLASH_MLA_CPU_ISA names a set this machine lacks.
CpuIsaInfo isa_info();

/// Throws as isa_info() does, and allocates nothing: for those who go on in threads that may not throw.
void check_isa();

/// Whether a set of that name has products of bf16 pairs (AVX512_BF16).
inline bool has_bf16_pairs(std::string_view isa) { return isa == "avx512_bf16" || isa == "avx512_amx"; }

/// The kernel for inputs of `dtype` and head dimension `d_qk` under the selected instruction set.
const TileKernel& select_tile_kernel(DType dtype, int d_qk);

}  // namespace flash_mla::cpu
