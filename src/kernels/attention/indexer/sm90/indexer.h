#pragma once

// The Hopper backend's side of the indexer. Free of CUDA headers. Implemented by logits.cu and quantise.cu, or by
// dense_decode/sm90/not_built.cpp in a build without CUDA.

#include <cstdint>

#include "kernels/attention/indexer/rows.h"

namespace flash_mla::sm90 {

/// Scores of the rows [first, last) of a call, row `first` in the first row of `logits`; e4m3. Pointers are of the
/// device. Needs no workspace.
void index_logits(const indexer::Rows& rows, std::int64_t first, std::int64_t last,
                  const indexer::Logits& logits, void* stream);

/// lengths[i] = the keys of row first + i.
void index_lengths(const indexer::Rows& rows, std::int64_t first, std::int64_t last, std::int32_t* lengths,
                   void* stream);

/// flash_mla::append_index_keys and quantise_index_queries on checked arguments of one CUDA device, queued on `stream`,
/// with the CPU's bits. They throw Unsupported where the device is none that this backend runs on.
void append_index_keys(const IndexKeyAppendArgs& args, void* stream);
void quantise_index_queries(const IndexQueryArgs& args, void* stream);

}  // namespace flash_mla::sm90
