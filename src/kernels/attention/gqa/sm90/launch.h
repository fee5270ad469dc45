#pragma once

#include "flash_mla/tensor.h"
#include "kernels/attention/gqa/sm90/params.h"

namespace flash_mla::sm90::gqa {

/// Whether there is a kernel for these head dimensions.
bool has_kernel(int d_qk, int d_v);
/// CTAs of it that a multiprocessor runs at a time.
int ctas_per_sm(int d_qk);
/// Queues the kernel, and with a schedule the combination of splits, on `stream` of the current device.
void launch(const Params& params, DType dtype, void* stream);

}  // namespace flash_mla::sm90::gqa
