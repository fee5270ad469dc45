#pragma once

// Random decode problems: the paged cache with its permuted block table, the queries and the outputs.

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "flash_mla/decode.h"

namespace flash_mla::bench {

/// Reproducible on every machine and standard library, unlike <random>'s distributions.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits();
  /// Uniform in [lowest, highest].
  std::int64_t integer(std::int64_t lowest, std::int64_t highest);
  /// Uniform in [0, 1).
  double uniform();
  bool chance(double probability) { return uniform() < probability; }
  /// N(0, 1).
  float normal();
  template <class T>
  const T& pick(const std::vector<T>& choices) {
    return choices[static_cast<std::size_t>(integer(0, static_cast<std::int64_t>(choices.size()) - 1))];
  }

 private:
  std::uint64_t state_;
  float spare_ = 0;
  bool has_spare_ = false;
};

/// Uninitialised memory aligned for any vector unit and for the library's workspace.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes);
  void* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(void* p) const { ::operator delete (p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<void, Free> data_;
  std::size_t bytes_ = 0;
};

struct ProblemSpec {
  std::vector<std::int32_t> cache_seqlens;
  int s_q = 1;
  int h_q = 128;
  int h_kv = 1;
  int d_v = 512;
  int d_rope = 64;
  int page_size = 64;
  DType dtype = DType::kBFloat16;
  bool causal = false;
  std::optional<float> softmax_scale;
  std::uint64_t seed = 0;
  /// Pages of the pool that no request uses.
  int spare_pages = 3;
  /// Elements between the end of a page and the next one (a strided pool), and of a query head and the next.
  int page_gap = 0;
  int head_gap = 0;

  int d_qk() const { return d_v + d_rope; }
  std::int64_t batch() const { return static_cast<std::int64_t>(cache_seqlens.size()); }
  /// Tokens of all requests.
  std::int64_t tokens() const;
  /// 2 * h_q * s_q * tokens * (d_qk + d_v), not discounted for causal.
  double flop() const;
  /// q, the KV of every request once, and out.
  double bytes() const;
};

/// Lengths around `s_k`: all equal, or for `varlen` normally distributed with a deviation of s_k / 2 and
/// clamped to [1, 2 * s_k].
std::vector<std::int32_t> draw_lengths(int b, int s_k, bool varlen, std::uint64_t seed);

/// Allocates and fills a problem. q and cache are clamp(N(0, 1) / 10, -1, 1). Whatever the library must not
/// look at is poison: NaN in cache slots beyond a request's length, in spare pages and in gaps,
/// 2147480000 and -1 in unused block-table entries. Pages are dealt out in random order. Outputs start as
/// NaN.
class Problem {
 public:
  explicit Problem(const ProblemSpec& spec);
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  const ProblemSpec& spec() const { return spec_; }
  const DenseDecodeArgs& args() const { return args_; }
  /// causal and softmax_scale as the spec has them.
  DenseDecodeOptions options() const;

 private:
  void fill_block_table(Random& random, std::int64_t max_blocks, std::int64_t num_blocks);
  void fill_cache(Random& random);

  ProblemSpec spec_;
  Buffer q_, k_cache_, block_table_, cache_seqlens_, out_, lse_;
  DenseDecodeArgs args_;
};

/// The arguments of one query head of one request: the same memory, seen as a batch of one.
DenseDecodeArgs slice_head(const DenseDecodeArgs& args, std::int64_t request, std::int64_t head);

/// A schedule and a workspace for one problem and thread count; run() only decodes.
class DecodeRun {
 public:
  DecodeRun(const Problem& problem, int num_threads, int fixed_split_blocks = 0, int num_parts = 0);
  void run() const { dense_decode(args_, schedule_.view(), workspace_.data(), workspace_.bytes(), options_); }
  std::size_t workspace_bytes() const { return workspace_.bytes(); }

 private:
  DenseDecodeArgs args_;
  DenseDecodeOptions options_;
  DecodeSchedule schedule_;
  Buffer workspace_;
};

}  // namespace flash_mla::bench
