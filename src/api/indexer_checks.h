#pragma once

// Argument checks of the indexer's operations.

#include "api/checks.h"
#include "flash_mla/indexer.h"

namespace flash_mla::api {

/// What shapes, dtypes and devices tell. `with_logits`: the call has logits of its own. `allow_reference_types`:
/// logits of float64.
void check_mqa_logits_shapes(const MqaLogitsArgs& args, const IndexerOptions& options, bool with_logits,
                             bool allow_reference_types);
void check_paged_mqa_logits_shapes(const PagedMqaLogitsArgs& args, const IndexerOptions& options,
                                   bool with_logits, bool allow_reference_types);
void check_index_append_shapes(const IndexKeyAppendArgs& args, const IndexerOptions& options);
void check_index_query_shapes(const IndexQueryArgs& args, const IndexerOptions& options);

/// What the values tell. Host tensors only.
void check_mqa_logits_values(const MqaLogitsArgs& args);
void check_paged_mqa_logits_values(const PagedMqaLogitsArgs& args);
void check_index_append_values(const IndexKeyAppendArgs& args);

}  // namespace flash_mla::api
