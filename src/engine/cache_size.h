#pragma once

#include "flash_mla/engine.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Pages of the cache that `options` ask for, or that fit and are of use. Throws InvalidArgument for options
/// out of range, among them more memory than there is.
int num_cache_pages(const model::Model& model, const EngineOptions& options);

/// Model::allocate_cache; throws OutOfMemory that says how much was asked for.
void allocate_cache(model::Model& model, int num_pages);

}  // namespace flash_mla::engine
