#pragma once

#include "flash_mla/engine.h"
#include "model/model.h"

namespace flash_mla::engine {

/// Pages of the cache that `options` ask for, or that fit and are of use. Throws InvalidArgument for options
/// out of range.
int num_cache_pages(const model::Model& model, const EngineOptions& options);

}  // namespace flash_mla::engine
