#include "kernels/attention/dense_prefill/cpu/dense_prefill.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/page_size.h"
#include "base/parallel.h"
#include "kernels/cache/cpu/dequantise.h"
#include "kernels/rows/cpu/rows.h"

// Keys are expanded kSpanKeys at a time, for all heads in one product; then every (head, tile of queries)
// walks the span in tiles of keys with an online softmax. All tile shapes are fixed and their borders are
// positions in the sequence, so the bits of a sequence do not depend on its neighbours.

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kSpanKeys = 512;
constexpr std::int64_t kTileKeys = 64;
constexpr std::size_t kMaxRow = 576;  // elements of a token of kv::Pool
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Memory of one thread that grows and stays.
struct Workspace {
  std::vector<std::byte> latents, k_rope, expanded;
  std::vector<float> states;

  template <class T>
  static T* grown(std::vector<T>& buffer, std::int64_t size) {
    if (buffer.size() < static_cast<std::size_t>(size)) buffer.resize(static_cast<std::size_t>(size));
    return buffer.data();
  }
};

/// The softmax's running state and the unnormalised output of one (head, tile of queries).
struct State {
  float* out;  // (tile, v)
  float* highest;
  float* sum;
};

class Prefill {
 public:
  Prefill(const DensePrefill& args, Workspace& workspace)
      : heads_(args.heads),
        nope_(args.nope),
        rope_(args.rope),
        v_(args.v),
        rank_(args.rank),
        scale_(args.scale),
        num_tokens_(args.q.rows),
        seq_len_(args.seq_len),
        tile_(num_tokens_ >= 64 ? 64 : 32),
        tiles_((num_tokens_ + tile_ - 1) / tile_),
        element_(static_cast<std::int64_t>(dtype_size(args.q.dtype))),
        pages_(args.pages),
        q_(args.q),
        cache_(args.cache),
        pool_(args.pool),
        out_(args.out),
        span_(std::min(kSpanKeys, seq_len_)),
        latents_(Workspace::grown(workspace.latents, span_ * rank_ * element_)),
        k_rope_(Workspace::grown(workspace.k_rope, span_ * rope_ * element_)),
        expanded_(Workspace::grown(workspace.expanded, span_ * heads_ * (nope_ + v_) * element_)),
        states_(Workspace::grown(workspace.states, heads_ * tiles_ * tile_ * (v_ + 2))) {}

  void run(Gemm& gemm, const PackedWeight& kv_b, int num_threads, bool batch_invariant) {
    const std::int64_t items = heads_ * tiles_;
    for (std::int64_t begin = 0; begin < seq_len_; begin += span_) {
      const std::int64_t count = std::min(span_, seq_len_ - begin);
      gather(begin, count, num_threads);
      const Matrix latents{latents_, q_.dtype, count, rank_, rank_};
      const std::int64_t width = heads_ * (nope_ + v_);
      const Matrix expanded{expanded_, q_.dtype, count, width, width};
      gemm.run(latents, kv_b, nullptr, expanded, {num_threads, batch_invariant, false});
      parallel_for(items, num_threads,
                   [&](std::int64_t item) { attend(gemm, item / tiles_, item % tiles_, begin, count); });
    }
    parallel_for(items, num_threads, [&](std::int64_t item) { finish(item / tiles_, item % tiles_); });
  }

 private:
  State state(std::int64_t head, std::int64_t tile) {
    float* base = states_ + (head * tiles_ + tile) * tile_ * (v_ + 2);
    return {base, base + tile_ * v_, base + tile_ * v_ + tile_};
  }
  std::int64_t rows_of(std::int64_t tile) const { return std::min(tile_, num_tokens_ - tile * tile_); }

  // Cached tokens [begin, begin + count) into dense rows.
  void gather(std::int64_t begin, std::int64_t count, int num_threads) {
    if (pool_ != nullptr) {
      parallel_for(count, count >= kTileKeys ? num_threads : 1,
                   [&](std::int64_t i) { dequantise_token(begin + i, i); });
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t page = pages_[static_cast<std::size_t>((begin + i) / kPageSize)];
      const std::byte* slot =
          cache_ + (page * kPageSize + (begin + i) % kPageSize) * (rank_ + rope_) * element_;
      std::memcpy(latents_ + i * rank_ * element_, slot, static_cast<std::size_t>(rank_ * element_));
      std::memcpy(k_rope_ + i * rope_ * element_, slot + rank_ * element_,
                  static_cast<std::size_t>(rope_ * element_));
    }
  }

  void dequantise_token(std::int64_t token, std::int64_t row) {
    alignas(64) std::array<float, kMaxRow> x;
    const std::int64_t page = pages_[static_cast<std::size_t>(token / kPageSize)];
    dequantise(*pool_, kv::locate(*pool_, page, token % kPageSize), x.data());
    rows::narrow(x.data(), latents_ + row * rank_ * element_, q_.dtype, rank_);
    rows::narrow(x.data() + rank_, k_rope_ + row * rope_ * element_, q_.dtype, rope_);
  }

  // Queries of one tile against the keys of the span.
  void attend(Gemm& gemm, std::int64_t head, std::int64_t tile, std::int64_t begin, std::int64_t count) {
    const std::int64_t rows = rows_of(tile), d = nope_ + rope_;
    // Position of the tile's first query; query r sees keys up to first + r.
    const std::int64_t first = seq_len_ - num_tokens_ + tile * tile_;
    const std::int64_t end = std::min(begin + count, first + rows);
    if (begin >= end) return;
    const State s = state(head, tile);
    if (begin == 0) {
      std::fill(s.out, s.out + tile_ * v_, 0.0f);
      std::fill(s.highest, s.highest + tile_, -kInfinity);
      std::fill(s.sum, s.sum + tile_, 0.0f);
    }
    thread_local std::vector<std::byte> queries, keys, values, weights;
    thread_local std::vector<float> scores;
    queries.resize(static_cast<std::size_t>(tile_ * d * element_));
    keys.resize(static_cast<std::size_t>(kTileKeys * d * element_));
    values.resize(static_cast<std::size_t>(kTileKeys * v_ * element_));
    weights.resize(static_cast<std::size_t>(tile_ * kTileKeys * element_));
    scores.resize(static_cast<std::size_t>(tile_ * kTileKeys));
    for (std::int64_t r = 0; r < rows; ++r) {
      std::memcpy(queries.data() + r * d * element_, q_.row(tile * tile_ + r) + head * d * element_,
                  static_cast<std::size_t>(d * element_));
    }
    std::memset(queries.data() + rows * d * element_, 0,
                static_cast<std::size_t>((tile_ - rows) * d * element_));
    for (std::int64_t key = begin; key < end; key += kTileKeys) {
      const std::int64_t n = std::min(kTileKeys, end - key);
      load_keys(head, key - begin, n, keys.data(), values.data());
      gemm.run_tile(queries.data(), keys.data(), true, scores.data(), tile_, kTileKeys, d, q_.dtype, false);
      for (std::int64_t r = 0; r < tile_; ++r) {
        soften(s, r, std::clamp<std::int64_t>(first + r + 1 - key, 0, n), scores.data() + r * kTileKeys,
               weights.data() + r * kTileKeys * element_);
      }
      gemm.run_tile(weights.data(), values.data(), false, s.out, tile_, v_, kTileKeys, q_.dtype, true);
    }
  }

  // Keys and values of one head, dense; what lies behind the last is zero.
  void load_keys(std::int64_t head, std::int64_t first, std::int64_t n, std::byte* keys, std::byte* values) {
    const std::int64_t d = nope_ + rope_, row = heads_ * (nope_ + v_);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::byte* kv = expanded_ + ((first + i) * row + head * (nope_ + v_)) * element_;
      std::byte* k = keys + i * d * element_;
      std::memcpy(k, kv, static_cast<std::size_t>(nope_ * element_));
      std::memcpy(k + nope_ * element_, k_rope_ + (first + i) * rope_ * element_,
                  static_cast<std::size_t>(rope_ * element_));
      std::memcpy(values + i * v_ * element_, kv + nope_ * element_, static_cast<std::size_t>(v_ * element_));
    }
    std::memset(keys + n * d * element_, 0, static_cast<std::size_t>((kTileKeys - n) * d * element_));
    std::memset(values + n * v_ * element_, 0, static_cast<std::size_t>((kTileKeys - n) * v_ * element_));
  }

  // One row of scores, of which the first `visible` count, becomes softmax weights; what was accumulated
  // before is rescaled to the new maximum.
  void soften(const State& s, std::int64_t r, std::int64_t visible, const float* scores, std::byte* weights) {
    std::int64_t written = 0;
    if (visible > 0) {
      const float highest = std::max(s.highest[r], rows::max(scores, visible) * scale_);
      const float shrink = s.highest[r] == -kInfinity ? 0.0f : std::exp(s.highest[r] - highest);
      s.sum[r] = s.sum[r] * shrink + rows::exp_sum(scores, scale_, highest, weights, q_.dtype, visible);
      s.highest[r] = highest;
      if (shrink != 1.0f) rows::scale(s.out + r * v_, shrink, v_);
      written = visible;
    }
    std::memset(weights + written * element_, 0, static_cast<std::size_t>((kTileKeys - written) * element_));
  }

  void finish(std::int64_t head, std::int64_t tile) {
    const State s = state(head, tile);
    for (std::int64_t r = 0; r < rows_of(tile); ++r) {
      float* row = s.out + r * v_;
      rows::scale(row, 1.0f / s.sum[r], v_);
      rows::narrow(row, out_.row(tile * tile_ + r) + head * v_ * element_, out_.dtype, v_);
    }
  }

  std::int64_t heads_, nope_, rope_, v_, rank_;
  float scale_;
  std::int64_t num_tokens_, seq_len_;
  std::int64_t tile_, tiles_;  // queries per tile
  std::int64_t element_;       // bytes
  std::span<const std::int32_t> pages_;
  Matrix q_;
  const std::byte* cache_;
  const kv::Pool* pool_;
  Matrix out_;
  std::int64_t span_;  // keys that are expanded at a time
  std::byte *latents_, *k_rope_, *expanded_;
  float* states_;
};

}  // namespace

void dense_prefill(Gemm& gemm, const DensePrefill& args) {
  thread_local Workspace workspace;
  Prefill(args, workspace).run(gemm, *args.kv_b, args.num_threads, args.batch_invariant);
}

}  // namespace flash_mla::cpu
