#pragma once

#include <cstddef>

#include "flash_mla/indexer.h"
#include "kernels/attention/indexer/cpu/key_tile.h"
#include "kernels/attention/indexer/rows.h"

namespace flash_mla::cpu {

/// Scores of the rows [first, last) of a call, row `first` in the first row of `logits`. The workspace has
/// index_logits_workspace_size bytes. Queries and keys are `element`s, rows.scales may be null. The engine calls it too.
FLASH_MLA_API void index_logits(const indexer::Rows& rows, IndexElement element, std::int64_t first,
                                std::int64_t last, const indexer::Logits& logits, void* workspace,
                                int num_threads);
FLASH_MLA_API std::size_t index_logits_workspace_size(const indexer::Rows& rows, IndexElement element,
                                                      int num_threads);

/// flash_mla::append_index_keys and quantise_index_queries on checked arguments.
void append_index_keys(const IndexKeyAppendArgs& args, int num_threads);
void quantise_index_queries(const IndexQueryArgs& args, int num_threads);

}  // namespace flash_mla::cpu
