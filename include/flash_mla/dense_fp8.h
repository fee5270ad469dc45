#pragma once

#include <cstddef>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/schedule.h"

namespace flash_mla {

/// The tensors of one dense MLA decode call over a cache in any format: DenseDecodeArgs with h_kv = 1, d_qk
/// 576 or 512 (the format's) and d_v 512.
struct DenseFp8DecodeArgs {
  /// (b, s_q, h_q, d_qk) bfloat16 | float16, on the CPU float32 as well. Last dimension contiguous
  TensorView q;
  KvCacheView cache;         ///< a kBFloat16 or kFloat16 cache has q's dtype, or q is float32
  TensorView block_table;    ///< (b, max_blocks) int32: page of each request's n-th page_size tokens
  TensorView cache_seqlens;  ///< (b) int32: keys of each request, 0 <= length <= max_blocks * page_size
  TensorView out;            ///< (b, s_q, h_q, 512), q's dtype; written
  TensorView lse{};          ///< optional, (b, h_q, s_q) float32, natural log; written
};

struct DenseFp8DecodeOptions : DenseDecodeOptions {
  /// Asks for products in FP8 (q and the softmax's weights rounded to e4m3 as well), faster and less exact. No
  /// backend has them yet: it is taken and without effect.
  bool fp8_mma = false;
};

/// Bytes of scratch memory dense_fp8_decode needs: as dense_decode_workspace_size.
FLASH_MLA_API std::size_t dense_fp8_decode_workspace_size(const DenseFp8DecodeArgs& args,
                                                          const DecodeScheduleView& schedule,
                                                          const DenseFp8DecodeOptions& options = {});

/// dense_decode over a cache in any format, dequantised with float32 scales. The schedule is the one of
/// dense_decode (build_decode_schedule), and so are the contracts: causal is bottom-right aligned, a row that
/// sees no key gives out = 0 and lse = +inf, pages past a request's length are never read. Throws
/// InvalidArgument or Unsupported.
FLASH_MLA_API void dense_fp8_decode(const DenseFp8DecodeArgs& args, const DecodeScheduleView& schedule,
                                    void* workspace, std::size_t workspace_bytes,
                                    const DenseFp8DecodeOptions& options = {});

namespace reference {

/// dense_fp8_decode by the definition, in float64, over the cache dequantised without rounding. `out` and
/// `lse` as in reference::dense_decode.
FLASH_MLA_API void dense_fp8_decode(const DenseFp8DecodeArgs& args,
                                    const DenseFp8DecodeOptions& options = {});

}  // namespace reference
}  // namespace flash_mla
