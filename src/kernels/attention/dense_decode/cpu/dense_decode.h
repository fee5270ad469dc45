#pragma once

#include <cstddef>

#include "flash_mla/decode.h"
#include "kv/format.h"

namespace flash_mla::cpu {

/// The CPU backend of flash_mla::dense_decode. Arguments have been checked; `softmax_scale` is resolved
/// and `num_threads` is at least 1.
struct DenseDecodeParams {
  float softmax_scale = 1.0f;
  bool causal = false;
  int num_threads = 1;
  /// A cache that is not rows of q's dtype, whose bytes args.k_cache then is.
  const kv::Pool* pool = nullptr;
};

std::size_t dense_decode_workspace_size(const DenseDecodeArgs& args, const DecodeScheduleView& schedule,
                                        const DenseDecodeParams& params);

void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView& schedule, void* workspace,
                  const DenseDecodeParams& params);

/// Threads OpenMP would use for a parallel region here.
int default_num_threads();

/// fork() copies a process without OpenMP's threads, and GCC's runtime then waits for them for ever. Whether
/// there were any is the runtime's secret, so that every child of the process that loaded the library runs on
/// one thread.
bool is_forked_child();

/// The threads of a call that asks for `wanted`: default_num_threads() for 0, and one in such a child.
inline int threads_of_call(int wanted) {
  return wanted == 0 || is_forked_child() ? default_num_threads() : wanted;
}

}  // namespace flash_mla::cpu
