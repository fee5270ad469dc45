#include "engine/cache_size.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/page_size.h"
#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

std::size_t cache_bytes(const model::Model& model, const EngineOptions& options) {
  constexpr std::size_t kHostBytes = std::size_t{2} << 30;
  if (options.memory_bytes > 0) return options.memory_bytes;
  const std::size_t free = model.free_memory();
  // Batch-invariant prompts leave partial results of each token and 1024 keys: 17 GB for 2048 tokens that see
  // 256 K of them with 16 heads.
  return free > 0 ? free / 10 * (options.batch_invariant ? 7 : 9) : kHostBytes;
}

}  // namespace

int num_cache_pages(const model::Model& model, const EngineOptions& options) {
  if (options.num_pages < 0) {
    throw InvalidArgument(
        fmt::format("num_pages is {}, expected 0 (from memory_bytes) or more", options.num_pages));
  }
  if (options.num_pages > 0) return options.num_pages;
  const std::int64_t useful = options.max_batch_size * ((model.max_position() + kPageSize - 1) / kPageSize);
  const std::size_t bytes = cache_bytes(model, options);
  const auto fitting = static_cast<std::int64_t>(bytes / std::max<std::size_t>(1, model.bytes_per_page()));
  if (fitting < 1) {
    throw InvalidArgument(fmt::format("memory_bytes is {}, expected at least the {} bytes of one page", bytes,
                                      model.bytes_per_page()));
  }
  const std::int64_t most = options.memory_bytes > 0 ? fitting : std::min(useful, fitting);
  return static_cast<int>(std::clamp<std::int64_t>(most, 1, std::int64_t{1} << 30));
}

}  // namespace flash_mla::engine
