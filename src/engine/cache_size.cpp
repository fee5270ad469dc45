#include "engine/cache_size.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "base/host_memory.h"
#include "base/page_size.h"
#include "flash_mla/error.h"

namespace flash_mla::engine {
namespace {

double gib(double bytes) { return bytes / (1 << 30); }

// Throws where the cache, or those of all ranks, larger than all the memory that there is. What is asked for may be `memory_bytes`
// or `num_pages`.
void check_fits(const model::Model& model, double num_pages, const char* name, double value) {
  const std::size_t device = model.free_memory();
  const double there = device > 0 ? static_cast<double>(device) : static_cast<double>(host_memory());
  const double bytes = num_pages * static_cast<double>(model.bytes_per_page());
  if (bytes <= there) return;
  throw InvalidArgument(
      fmt::format("{} is {:.0f}, a cache of {:.1f} GiB; expected at most {:.0f}: {} {:.1f} GiB", name, value,
                  gib(bytes), value * (there / bytes),
                  device > 0 ? "besides the model the device has" : "this machine has", gib(there)));
}

// Of a rank.
std::size_t cache_bytes(const model::Model& model, const EngineOptions& options) {
  constexpr std::size_t kHostBytes = std::size_t{2} << 30;
  const auto ranks = static_cast<std::size_t>(options.dp);
  if (options.memory_bytes > 0) return options.memory_bytes / ranks;
  const std::size_t free = model.free_memory();
  // Batch-invariant prompts leave partial results of each token and 1024 keys: 17 GB for 2048 tokens that see
  // 256 K of them with 16 heads.
  return free > 0 ? free / 10 * (options.batch_invariant ? 7 : 9) : kHostBytes / ranks;
}

}  // namespace

std::int64_t longest_sequence(const model::Model& model, const EngineOptions& options) {
  const std::int64_t wanted = options.max_model_len;
  if (wanted < 0 || wanted > model.max_position()) {
    throw InvalidArgument(
        fmt::format("max_model_len is {}, expected 0 (the model's) to the model's {} positions", wanted,
                    model.max_position()));
  }
  return wanted == 0 ? model.max_position() : wanted;
}

int num_cache_pages(const model::Model& model, const EngineOptions& options) {
  if (options.num_pages < 0) {
    throw InvalidArgument(
        fmt::format("num_pages is {}, expected 0 (from memory_bytes) or more", options.num_pages));
  }
  if (options.num_pages > 0) {
    check_fits(model, double{1} * options.num_pages * options.dp, "num_pages", options.num_pages);
    return options.num_pages;
  }
  const std::int64_t useful =
      options.max_batch_size * ((longest_sequence(model, options) + kPageSize - 1) / kPageSize);
  const std::size_t bytes = cache_bytes(model, options);
  const auto fitting = static_cast<std::int64_t>(bytes / std::max<std::size_t>(1, model.bytes_per_page()));
  if (fitting < 1) {
    throw InvalidArgument(fmt::format("memory_bytes is {}, expected at least the {} bytes of one page{}",
                                      options.memory_bytes > 0 ? options.memory_bytes : bytes,
                                      model.bytes_per_page() * static_cast<std::size_t>(options.dp),
                                      options.dp > 1 ? " on each rank" : ""));
  }
  if (options.memory_bytes > 0) {
    check_fits(model, static_cast<double>(fitting * options.dp), "memory_bytes",
               static_cast<double>(options.memory_bytes));
  }
  const std::int64_t most = options.memory_bytes > 0 ? fitting : std::min(useful, fitting);
  return static_cast<int>(std::clamp<std::int64_t>(most, 1, std::int64_t{1} << 30));
}

void allocate_cache(model::Model& model, int num_pages) {
  try {
    model.allocate_cache(num_pages);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(
        fmt::format("the cache of {} pages, {:.1f} GiB, cannot be allocated (num_pages, memory_bytes)",
                    num_pages, gib(num_pages * static_cast<double>(model.bytes_per_page()))));
  }
}

}  // namespace flash_mla::engine
