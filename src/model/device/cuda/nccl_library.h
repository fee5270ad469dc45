#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace flash_mla::model {

// What we use of NCCL (libnccl.so.2, 2.9 or later), in our own words: it is opened at run time, and absent without harm. Calls
// return 0 or an error.

inline constexpr int kNcclInt8 = 0, kNcclBfloat16 = 9, kNcclSum = 0;

using NcclGroup = void*;
struct NcclId {
  char bytes[128];
};

struct NcclLibrary {
  const char* (*get_error_string)(int error);
  int (*get_unique_id)(NcclId* id);
  int (*init_rank)(NcclGroup* group, int size, NcclId id, int rank);
  int (*abort)(NcclGroup group);
  int (*destroy)(NcclGroup group);
  int (*all_reduce)(const void* in, void* out, std::size_t count, int type, int operation, NcclGroup group,
                    cudaStream_t stream);
  int (*all_gather)(const void* in, void* out, std::size_t count, int type, NcclGroup group,
                    cudaStream_t stream);
};

/// Opens what FLASH_MLA_NCCL names, or libnccl.so.2 where the loader finds it; it then stays. Throws Unsupported.
const NcclLibrary& open_nccl();
/// Why open_nccl throws, or "".
std::string why_no_nccl();

}  // namespace flash_mla::model
