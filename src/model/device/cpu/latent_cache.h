#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/matrix.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/schedule.h"
#include "kv/format.h"
#include "model/device/cpu/context.h"

namespace flash_mla::model {

/// A layer's latents and keys, in pages of kPageSize tokens: rows of the context's dtype, or in its cache format.
class CpuLatentCache {
 public:
  explicit CpuLatentCache(const CpuContext& context) : context_(context) {}

  std::size_t bytes_per_page() const;
  void free() { data_ = {}; }
  void allocate(int num_pages);
  void clear() { std::memset(data_.data(), 0, data_.bytes()); }
  void copy_page(int source, int target);
  std::span<std::byte> page(int index) const {
    return {data_.data() + static_cast<std::size_t>(index) * bytes_per_page(), bytes_per_page()};
  }
  /// Of its rows, in words.
  std::string format() const;
  /// Whether they are 512 + 64 elements of bfloat16.
  bool has_plain_rows() const;

  /// The rows themselves, (pages, kPageSize, rank + rope); null where they have another format.
  std::byte* rows() const { return context_.cache_format ? nullptr : data_.data(); }
  /// The pages in that format.
  kv::Pool pool() const { return kv::make_pool(view(kPageSize)); }
  /// Writes rows (tokens, rank + rope) into the slots of the step's tokens. Not where there is rows().
  void append(const Matrix& x);

  /// Absorbed tokens and the keys that each attends to, as dense decode has them: runs of `run` tokens, of which each
  /// sees one key more than the one before.
  struct Lists {
    const std::int32_t* table = nullptr;  ///< (count * run, width): pages
    std::int64_t width = 0, page_size = kPageSize;
    const std::int32_t* lengths = nullptr;  ///< (count): keys that the last token of a run sees
    std::int64_t count = 0;                 ///< runs
    DecodeScheduleView schedule{};
    std::int64_t run = 1;
  };
  /// q (tokens, heads * (rank + rope)), out (tokens, heads * rank).
  void attend(const Matrix& q, const Matrix& out, const Lists& lists, Buffer& workspace) const;

 private:
  std::int64_t width() const { return context_.config.kv_lora_rank + context_.config.qk_rope_head_dim; }
  /// Of pages of `page_size` tokens; with a cache format.
  KvCacheView view(std::int64_t page_size) const;
  std::int64_t num_tokens() const {
    return static_cast<std::int64_t>(data_.bytes() / bytes_per_page()) * kPageSize;
  }

  const CpuContext& context_;
  Buffer data_;
};

}  // namespace flash_mla::model
