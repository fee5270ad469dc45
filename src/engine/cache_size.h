#pragma once

#include "flash_mla/engine.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Tokens of prompt and continuation together that model and options allow. Throws InvalidArgument for
/// EngineOptions::max_model_len out of range.
std::int64_t longest_sequence(const model::Model& model, const EngineOptions& options);

/// Pages of the cache that `options` ask for, or that fit and are of use. Throws InvalidArgument for options
/// out of range, among them more memory than there is.
int num_cache_pages(const model::Model& model, const EngineOptions& options);

/// Model::allocate_cache; throws OutOfMemory that says how much was asked for.
void allocate_cache(model::Model& model, int num_pages);

}  // namespace flash_mla::engine
