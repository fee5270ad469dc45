#pragma once

// Argument checks of caches in a format, and of the operations on them.

#include "api/checks.h"
#include "flash_mla/dense_fp8.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/sparse.h"

namespace flash_mla::api {

/// Format, dtype, shape and strides of a cache.
void check_cache(const KvCacheView& cache, const char* name);

/// What shapes, dtypes and devices tell. `allow_reference_types`: outputs of float32 or float64.
void check_sparse_decode_shapes(const SparseDecodeArgs& args, const SparseDecodeOptions& options,
                                bool allow_reference_types);
void check_sparse_prefill_shapes(const SparsePrefillArgs& args, const SparsePrefillOptions& options,
                                 bool allow_reference_types);
void check_dense_fp8_decode_shapes(const DenseFp8DecodeArgs& args, const DenseFp8DecodeOptions& options,
                                   bool allow_reference_types);

/// What the values tell. Host tensors only.
void check_sparse_decode_values(const SparseDecodeArgs& args);
void check_sparse_prefill_values(const SparsePrefillArgs& args);
void check_dense_fp8_decode_values(const DenseFp8DecodeArgs& args);

void check_append_shapes(const KvAppendArgs& args, const KvCacheOptions& options);
void check_append_values(const KvAppendArgs& args);
void check_gather_shapes(const KvGatherArgs& args, const KvCacheOptions& options);
void check_gather_values(const KvGatherArgs& args);

}  // namespace flash_mla::api
