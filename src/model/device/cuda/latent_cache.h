#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/buffer.h"
#include "base/matrix.h"
#include "flash_mla/kv_cache.h"
#include "model/device/cuda/context.h"

namespace flash_mla::model {

/// A layer's latents and keys, in pages of kPageSize tokens: rows of bfloat16, or of KvFormat::kFp8V32 where the
/// context says so.
class CudaLatentCache {
 public:
  explicit CudaLatentCache(CudaContext& context) : context_(context) {}

  std::size_t bytes_per_page() const;
  std::int64_t num_pages() const { return static_cast<std::int64_t>(data_.bytes() / bytes_per_page()); }
  void free() { data_ = {}; }
  void allocate(int num_pages);
  /// Zeros all of it; queued.
  void clear();
  void copy_page(int source, int target);
  std::span<std::byte> page(int index) const {
    return {data_.data() + static_cast<std::size_t>(index) * bytes_per_page(), bytes_per_page()};
  }
  /// Of its rows, in words.
  std::string format() const;
  /// Whether they are 512 + 64 elements of bfloat16.
  bool has_plain_rows() const;

  /// The rows themselves, (pages, kPageSize, rank + rope) bfloat16; null where they are FP8.
  std::byte* rows() const { return context_.fp8_cache ? nullptr : data_.data(); }
  /// Writes bfloat16 rows into the slots of as many of the step's tokens, from `first_token` on. Not where there is
  /// rows().
  void append(const Matrix& keys, std::int64_t first_token) const;
  /// Attention of tokens from `first_token` of the step on, in the absorbed form, each to the slots that the context's
  /// selection has for it: q (tokens, heads * (rank + rope)), out (tokens, heads * rank). A token's bits are its own in
  /// a batch-invariant step.
  void attend_listed(const Matrix& q, const Matrix& out, std::int64_t first_token) const;

 private:
  std::int64_t width() const { return context_.config.kv_lora_rank + context_.config.qk_rope_head_dim; }
  KvCacheView view() const;
  void decode_listed(const Matrix& q, const Matrix& out, const TensorView& lengths, TensorView lists) const;
  void prefill_listed(const Matrix& q, const Matrix& out, const TensorView& lengths,
                      const TensorView& lists) const;

  CudaContext& context_;
  Buffer data_;
};

}  // namespace flash_mla::model
