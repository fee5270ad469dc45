#pragma once

namespace flash_mla {

/// Tokens per page of a model's cache. Model, page pool and kernels agree on it; the public operations take
/// caches of other page sizes too.
inline constexpr int kPageSize = 64;

}  // namespace flash_mla
