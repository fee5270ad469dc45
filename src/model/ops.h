#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "checkpoint/config.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"
#include "kernels/sampling/draw.h"

namespace flash_mla::model {

struct Weights;
using checkpoint::ModelConfig;

/// The weights of x -> x·W^T + bias, in whatever layout the device multiplies best.
class Linear {
 public:
  virtual ~Linear() = default;
};

/// One matrix per attention head.
class HeadLinear {
 public:
  virtual ~HeadLinear() = default;
};

/// The feed-forward networks of a layer's routed experts.
class Experts {
 public:
  virtual ~Experts() = default;
};

/// Which pages hold one sequence, and which of the step's tokens are its new ones.
struct Chunk {
  std::int64_t first_token = 0;
  std::int64_t num_tokens = 0;
  std::int64_t seq_len = 0;  ///< with this step's tokens
  std::vector<std::int32_t> pages;
};

/// What a step is, on the host. Its tokens are ordered so that those that take the absorbed form of
/// attention come first; each of them is a request of its own there.
struct Step {
  std::vector<std::int32_t> token_ids;  ///< (num_tokens); -1 - i: the i-th of the tokens that embed is given
  std::vector<std::int32_t> positions;  ///< (num_tokens)
  std::vector<std::int64_t> slots;      ///< (num_tokens): page * kPageSize + offset

  std::int64_t num_absorbed = 0;
  std::int64_t max_blocks = 1;
  std::vector<std::int32_t> absorbed_lens;   ///< (num_absorbed): keys the token sees
  std::vector<std::int32_t> absorbed_table;  ///< (num_absorbed, max_blocks): pages

  std::vector<Chunk> chunks;  ///< the sequences behind them, in the un-absorbed form

  std::vector<std::int32_t> logit_rows;  ///< tokens whose logits are wanted, then those of first_chosen on:
  std::int64_t first_chosen = 0;         ///< of them only a token is
  std::vector<Draw> draws;               ///< (logit_rows), which is drawn where a scale is set; or empty
  bool batch_invariant = false;

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(token_ids.size()); }
};

/// Bytes on their way to the host.
class Download {
 public:
  virtual ~Download() = default;
  /// Returns when they have come. They stay as long as this object.
  virtual const std::byte* wait() = 0;
};

/// What the model asks of a device. Activations are matrices of one row per token in `dtype()`; sums are
/// accumulated in fp32. Calls are queued in order and may return before they ran; only download() and
/// Download::wait() wait. In a batch-invariant step no row's bits depend on the other rows.
class Ops {
 public:
  virtual ~Ops() = default;

  /// Of weights, activations and cache.
  virtual DType dtype() const = 0;
  /// As Model's.
  virtual std::size_t free_memory() const { return 0; }
  virtual ScheduleOptions schedule_options(int sequences, bool batch_invariant) const = 0;

  // Memory and weights. Host arrays are free again when the call returns. Where a weight is null (or `read`
  // empty) a device that makes_up_weights() takes random ones, which are then never on the host: for
  // benchmarks.
  virtual bool makes_up_weights() const { return false; }
  /// Whether weights are to be given in bfloat16; else in float32.
  virtual bool takes_bfloat16() const { return false; }
  virtual Buffer allocate(std::size_t bytes) = 0;
  /// What begin_step makes of that many tokens at most.
  virtual std::int64_t padded(std::int64_t num_tokens) const { return num_tokens; }
  /// Makes room for steps of up to `num_tokens` tokens, as Model::reserve does.
  virtual void reserve(std::int64_t num_tokens) { static_cast<void>(num_tokens); }
  /// Parameters that stay float32: norm weights, biases.
  virtual Buffer make_vector(std::span<const float> values) = 0;
  virtual Buffer make_table(HostWeight values, std::int64_t rows, std::int64_t columns) = 0;
  /// `weight` (out_features, in_features); `bias` (out_features) or empty.
  virtual std::unique_ptr<Linear> make_linear(HostWeight weight, std::int64_t out_features,
                                              std::int64_t in_features, std::span<const float> bias) = 0;
  /// The same where other weights may be quantised: these keep dtype().
  virtual std::unique_ptr<Linear> make_unquantized_linear(HostWeight weight, std::int64_t out_features,
                                                          std::int64_t in_features) {
    return make_linear(weight, out_features, in_features, {});
  }
  /// A Linear that multiplies in fp32 whatever dtype() is; `weight` is float32.
  virtual std::unique_ptr<Linear> make_router(const float* weight, std::int64_t num_experts,
                                              std::int64_t in_features) = 0;
  /// `weight` (heads, out_features, in_features).
  virtual std::unique_ptr<HeadLinear> make_head_linear(HostWeight weight, std::int64_t heads,
                                                       std::int64_t out_features,
                                                       std::int64_t in_features) = 0;
  /// `read(e, gate_up, down)` fills expert e's (2 * intermediate, hidden) and (hidden, intermediate).
  virtual std::unique_ptr<Experts> make_experts(int num_experts, std::int64_t hidden,
                                                std::int64_t intermediate,
                                                const std::function<void(int, void*, void*)>& read) = 0;

  /// Hands over the step that the calls below belong to: metadata goes to the device, the decode schedule is
  /// made, once for all layers. A device may append tokens and logit rows whose results nobody reads, to a
  /// size that it has prepared; their slot is -1. `step` must live until the next begin_step.
  virtual void begin_step(Step& step) = 0;
  /// Runs `layers`, which makes the step's calls from embed to choose, or replays what it recorded when
  /// it last did so for a step of this shape.
  virtual void run(const std::function<void()>& layers) { layers(); }
  /// Of the steps that have run, where they are timed.
  virtual double device_seconds() const { return 0; }

  /// Whether begin_step may come again within a forward pass, for the rows whose logits are wanted.
  virtual bool narrows() const { return false; }

  /// Runs all layers of the step at once: x (tokens, hidden), the embeddings, becomes what the last layer
  /// leaves. `caches` and `ids` belong to the layers; a mixture layer's chosen experts go to its ids. False:
  /// the device takes such a step layer by layer, and nothing was queued.
  virtual bool run_layers(const Weights& weights, std::span<const Buffer> caches, std::span<const Buffer> ids,
                          Matrix x) {
    static_cast<void>(weights), static_cast<void>(caches), static_cast<void>(ids), static_cast<void>(x);
    return false;
  }

  /// out[t] = table[token_ids[t]], where a negative token_ids[t] is tokens[-1 - token_ids[t]] (int32), and
  /// any row of the table if that is negative too.
  virtual void embed(const Buffer& table, const Buffer& tokens, Matrix out) = 0;
  /// out = x / sqrt(mean(x²) + eps) * weight
  virtual void rms_norm(Matrix x, const Buffer& weight, double eps, Matrix out) = 0;
  virtual void linear(Matrix x, const Linear& weight, Matrix out) = 0;
  /// inout += x·W^T + bias
  virtual void linear_add(Matrix x, const Linear& weight, Matrix inout) = 0;
  /// out = silu(x·G^T) * (x·U^T), where the rows of `gate_up` are [G; U]
  virtual void linear_silu_mul(Matrix x, const Linear& gate_up, Matrix out) = 0;

  /// Rotates the rope part of every head of q (tokens, heads * (nope + rope)) in place; normalises the latent
  /// in kv (tokens, rank + rope), rotates its rope part and writes both to the token's slot of the cache, if
  /// it has one.
  /// The rows are the step's tokens from `first_token` on.
  virtual void rope_and_append(Matrix q, Matrix kv, std::int64_t first_token, const Buffer& kv_norm,
                               double eps, const Buffer& cache) = 0;
  /// q_latent[t, h] = [q_nope[t, h] · W_UK[h] | q_rope[t, h]]: (tokens, heads * (rank + rope))
  virtual void absorb_queries(Matrix q, const HeadLinear& w_uk, Matrix q_latent) = 0;
  /// Both, for the step's first tokens. q may be left rotated or not.
  virtual void append_and_absorb(Matrix q, Matrix kv, const Buffer& kv_norm, double eps, const Buffer& cache,
                                 const HeadLinear& w_uk, Matrix q_latent) {
    rope_and_append(q, kv, 0, kv_norm, eps, cache);
    absorb_queries(q, w_uk, q_latent);
  }
  /// Attention of the step's absorbed tokens over the cache; out_latent (tokens, heads * rank).
  virtual void decode_attention(Matrix q_latent, const Buffer& cache, Matrix out_latent) = 0;
  /// out[t, h] = out_latent[t, h] · W_UV[h]^T: (tokens, heads * v)
  virtual void expand_values(Matrix out_latent, const HeadLinear& w_uv, Matrix out) = 0;
  /// Causal attention of the step's chunks with keys and values expanded from the cached latents.
  virtual void prefill_attention(Matrix q, const Buffer& cache, const Linear& kv_b, Matrix out) = 0;

  /// Whether this device treats the shared experts as experts that every token chooses, with weight 1: their
  /// weights then stand behind those of the routed ones in make_experts.
  virtual bool folds_shared_experts() const { return false; }
  /// Experts of every token and their weights, by the configuration's routing; they stay on the device as
  /// `ids` (tokens, num_experts_per_tok, and the shared ones if folded) int32 and `weights` of the same
  /// shape, float32. `bias`: V3's correction, or empty.
  virtual void route(Matrix x, const Linear& router, const Buffer& bias, const Buffer& ids,
                     const Buffer& weights) = 0;
  /// inout[t] += sum over t's experts e of weight * ffn_e(x[t])
  virtual void experts_add(Matrix x, const Experts& experts, const Buffer& ids, const Buffer& weights,
                           Matrix inout) = 0;
  /// h = rms_norm(x), and the routing of h.
  virtual void norm_and_route(Matrix x, const Buffer& norm, double eps, Matrix h, const Linear& router,
                              const Buffer& bias, const Buffer& ids, const Buffer& weights) {
    rms_norm(x, norm, eps, h);
    route(h, router, bias, ids, weights);
  }
  /// inout as experts_add(h, ...) leaves it, then h = rms_norm(inout).
  virtual void experts_add_and_norm(Matrix h, const Experts& experts, const Buffer& ids,
                                    const Buffer& weights, Matrix inout, const Buffer& norm, double eps) {
    experts_add(h, experts, ids, weights, inout);
    rms_norm(inout, norm, eps, h);
  }

  /// out[i] = x[logit_rows[i]]
  virtual void gather_logit_rows(Matrix x, Matrix out) = 0;
  /// Copies `bytes` bytes within the device.
  virtual void copy(const Buffer& buffer, std::size_t source, std::size_t target, std::size_t bytes) = 0;
  /// tokens[i] (int32) of logit row i from the step's first_chosen on (and maybe of those before): the
  /// likeliest or the drawn one, as Model::collect says.
  virtual void choose(Matrix logits, const Buffer& tokens) = 0;
  /// `bytes` bytes from the device to the host; returns when everything queued has run.
  virtual void download(const std::byte* data, std::size_t bytes, void* host) = 0;
  /// Queues the same, of what everything queued so far leaves there.
  virtual std::unique_ptr<Download> start_download(const std::byte* data, std::size_t bytes) = 0;
  /// Whether calls return before they ran.
  virtual bool queues() const { return false; }
};

}  // namespace flash_mla::model
