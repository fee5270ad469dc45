#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "base/parallel.h"
#include "checkpoint/config.h"
#include "comm/communicator.h"
#include "flash_mla/kv_cache.h"
#include "flash_mla/schedule.h"
#include "kernels/gemm/cpu/gemm.h"
#include "model/model.h"
#include "model/parallel/partition.h"
#include "model/rope.h"
#include "model/step.h"

namespace flash_mla::model {

/// What the layers of the CPU share: how they work, the step that runs, and memory for activations that grows
/// and stays.
struct CpuContext {
  CpuContext(const ModelConfig& model_config, DType type, std::optional<KvFormat> format,
             const ModelOptions& options, Partition part = {}, RankLinks links = {})
      : config(model_config),
        dtype(type),
        quantize(options.quantize),
        cache_format(format),
        fp8_index_keys(options.fp8_index_keys || format == KvFormat::kFp8V32),
        on_product(options.on_product),
        panels(options.batch_invariant),
        threads(options.num_threads > 0 ? options.num_threads : default_threads()),
        rope(make_rope(model_config)),
        partition(std::move(part)),
        ranks(links.ranks),
        expert_ranks(links.expert_ranks) {}

  ScheduleOptions schedule_options(bool batch_invariant) const;
  /// As Device::reserve; what a layer keeps for itself is not in it.
  void reserve(std::int64_t num_tokens, std::int64_t num_rows);
  /// `next` must live until the one after it begins.
  void begin_step(const Step& next);
  struct Narrowed {
    Matrix* rows;
    Buffer* buffer;  ///< for what is left of them
  };
  /// Goes on with the step's logit rows alone (logit_step): those of these matrices, and of the selection.
  void narrow(std::initializer_list<Narrowed> matrices);
  /// Keys that sparse attention lets a token of the step see at most; and whether it chooses for any.
  std::int64_t index_topk() const { return config.index_topk; }
  bool selects() const { return selects_; }
  /// Keys that a token of the step sees, before any choice.
  std::int64_t length(std::int64_t token) const {
    return step->positions[static_cast<std::size_t>(token)] + 1;
  }

  std::int64_t element() const { return static_cast<std::int64_t>(dtype_size(dtype)); }
  /// (rows, columns) in a buffer that grows and stays.
  static Matrix matrix(Buffer& buffer, DType type, std::int64_t rows, std::int64_t columns);
  Matrix activations(Buffer& buffer, std::int64_t rows, std::int64_t columns) const {
    return matrix(buffer, dtype, rows, columns);
  }
  /// out[i] = x[logit_rows[i]]
  void gather_logit_rows(const Matrix& x, const Matrix& out) const;
  /// out = x / sqrt(mean(x²) + eps) * weight
  void rms_norm(const Matrix& x, const std::vector<float>& weight, double eps, const Matrix& out) const;

  /// f(row), by as many threads as `rows` rows of `columns` elements are worth.
  template <class F>
  void for_rows(std::int64_t rows, std::int64_t columns, F&& f) const {
    parallel_for(rows, rows * columns >= kParallelElements ? threads : 1, f);
  }

  /// Elements below which a row-wise operation is not worth waking a second thread.
  static constexpr std::int64_t kParallelElements = 16384;

  const ModelConfig config;  ///< with this rank's heads
  const DType dtype;         ///< of weights, activations and cache
  const ModelQuantize quantize;
  const std::optional<KvFormat> cache_format;  ///< of the cache, where its rows are not of `dtype`
  const bool fp8_index_keys;                   ///< index keys are e4m3, else of `dtype`
  const std::function<void(std::span<const std::string>, const Matrix&)> on_product;  ///< ModelOptions'
  const bool panels;  ///< a product's bits do not depend on how many of its outputs are this rank's
  const int threads;
  const Rope rope;
  const Partition partition;
  comm::Communicator* const ranks;         ///< RankLinks'
  comm::Communicator* const expert_ranks;  ///< likewise
  mutable cpu::Gemm gemm;

  const Step* step = nullptr;
  std::vector<float> cosines, sines;  ///< (tokens, qk_rope_head_dim / 2)
  /// Absorbed tokens that dense decode takes in one call: runs of consecutive tokens of a sequence, each of which
  /// goes over the keys once. Tokens that an indexer chooses for are runs of one.
  struct Runs {
    std::int64_t first = 0;             ///< token
    std::int64_t tokens = 1;            ///< of a run
    std::vector<std::int32_t> lengths;  ///< (runs): keys attended to by the last of them, at most index_topk
    DecodeSchedule schedule;
  };
  std::vector<Runs> runs;  ///< of all absorbed tokens, in their order
  /// (tokens, index_topk): slots that the last indexer chose, ascending by position, for tokens that see more.
  std::vector<std::int32_t> selection;

  struct {
    Buffer x, h, qkv_a, q_a, q, keys, q_latent, out_latent, attended, gate_up, act;
    Buffer decode_workspace, expert_weights, expert_out;
    Buffer index_k, index_q, index_h, index_weights, index_logits, index_workspace;
    Buffer index_values, index_scaled_weights;                                   ///< of queries in FP8
    Buffer logit_x, logit_q, logit_q_a, logit_index_h, logit_h, logits, tokens;  ///< of the logit rows
    Buffer sum, gathered, sent, received;  ///< of exchanges between ranks
  } buffers;

 private:
  std::int64_t longest_run() const;
  void find_runs();

  Step narrowed_;
  bool selects_ = false;
};

}  // namespace flash_mla::model
