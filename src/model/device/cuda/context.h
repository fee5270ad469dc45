#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/buffer.h"
#include "base/matrix.h"
#include "checkpoint/config.h"
#include "flash_mla/decode.h"
#include "flash_mla/schedule.h"
#include "flash_mla/tensor.h"
#include "kernels/gemm/sm90/cublaslt.h"
#include "kernels/rows/sm90/rows.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/one_token_pass.h"
#include "model/device/cuda/rule_upload.h"
#include "model/device/cuda/step_data.h"
#include "model/device/cuda/stream.h"
#include "model/device/cuda/weight_loader.h"
#include "model/step.h"

namespace flash_mla::model {

/// Of a weight in e4m3, what is widened to bfloat16 at a time.
inline constexpr std::int64_t kMaxWidenedBytes = std::int64_t{64} << 20;

/// Activations in e4m3 on the device, with a scale for every row and 128 columns.
struct QuantisedRows {
  std::byte* codes = nullptr;
  float* scales = nullptr;
};

/// What the layers of a GPU share: stream and memory, the step that runs, and memory for activations that
/// grows and stays. All activations are bfloat16 but where it says so.
struct CudaContext {
  /// `fp8_latents`: the latent cache is that of KvFormat::kFp8V32; only with an indexer.
  CudaContext(const ModelConfig& model_config, ModelQuantize quantize, bool fp8_latents);

  /// Of decode attention over sequences of `tokens` new tokens each.
  ScheduleOptions schedule_options(int sequences, bool batch_invariant, int tokens = 1) const;
  /// As Device::reserve.
  void reserve(std::int64_t num_tokens, std::int64_t num_rows);
  /// Pads the step where it is one of those that are recorded; its metadata goes to the device.
  void begin_step(Step& next);
  /// To be called before the layers: queues what makes the decode schedule.
  void begin_pass();
  /// Whether one kernel does all layers of the step: it has one token, or a few of one sequence.
  bool is_one_token_step() const;
  /// To be called when x of all layers is to be read: queues that kernel, unless it has been.
  void finish_layers(const Matrix& x);
  /// Keys that sparse attention lets a token see at most; and whether the step's tokens attend to lists, all but those
  /// of StepData::groups. A batch-invariant step always does, since whether it has to depends on other sequences.
  std::int64_t index_topk() const { return config.index_topk; }
  bool selects() const { return selects_; }

  /// Of at least that many bytes: contents are lost when it grows.
  void grow(Buffer& buffer, std::size_t bytes);
  /// (rows, columns) in a buffer that grows and stays.
  Matrix activations(Buffer& buffer, std::int64_t rows, std::int64_t columns, DType dtype = DType::kBFloat16);
  /// Memory for the keys and values that prefill attention expands at a time.
  void grow_expanded(std::int64_t keys);
  /// Chosen experts of a token, with the shared ones.
  int experts_per_token() const { return config.num_experts_per_tok + config.n_shared_experts; }
  /// To be called when a layer has got weights in e4m3 that take `columns` inputs: they are widened, or these inputs
  /// quantised, where many rows are multiplied, and the kernel of one token takes bfloat16 alone.
  void prepare_e4m3(std::int64_t columns);
  /// The same for experts in 4 bits.
  void prepare_int4();
  /// Whether products of that many rows by weights in e4m3 are made in FP8.
  bool multiplies_fp8(std::int64_t rows) const { return rows >= fp8_rows && !step->batch_invariant; }
  /// Memory for inputs in e4m3: (rows, columns) and then their scales, (rows, ceil(columns / 128)).
  QuantisedRows quantised_rows(Buffer& buffer, std::int64_t rows, std::int64_t columns);
  /// Absorbed tokens of a sequence that attend to its cache as one request; all have as many. 1: each for itself.
  std::int64_t tokens_per_request() const { return tokens_per_request_; }
  /// To the host; returns when everything queued has run.
  void download(const std::byte* from, std::size_t bytes, void* to);
  void rms_norm(const Matrix& x, const Buffer& weight, double eps, const Matrix& out) const;

  const ModelConfig config;
  const bool fp8_cache;
  /// Rows from which on products by weights in e4m3 are made in FP8: 64, or what the environment variable
  /// FLASH_MLA_FP8_ROWS says.
  const std::int64_t fp8_rows;
  Stream stream;
  std::shared_ptr<DevicePool> pool = std::make_shared<DevicePool>();
  sm90::CublasLt lt;
  WeightLoader weights;

  const Step* step = nullptr;
  bool recorded = false;      ///< the step is one of those that are replayed
  bool keeps_states = false;  ///< for a module for multi-token prediction
  StepData data;
  RuleUploader rules;
  sm90::RotationTable rotations;
  DecodeScheduleView schedule;  ///< of the absorbed tokens, where the sm90 kernel takes them
  OneTokenPass one_token;

  struct {
    Buffer x, h, qkv_a, q_a, q, q_latent, out_latent, attended, gate_up, act;
    Buffer decode_workspace, prefill_workspace;
    Buffer latents, k_rope, expanded;  ///< grow_expanded
    Buffer widened;                    ///< kMaxWidenedBytes where there are weights in e4m3
    Buffer quantised;                  ///< quantised_rows() of what such weights multiply
    Buffer router_logits, expert_weights, expert_workspace;
    std::vector<Buffer> expert_ids;  ///< of each mixture layer (tokens, experts_per_token()) int32
    Buffer logit_h, logits, tokens, likeliest_scratch;  ///< of the logit rows
    Buffer states, own_states,
        joined;   ///< (tokens, hidden), (logit rows, hidden), (tokens, 2 * hidden): CudaMtpInput's
    Buffer keys;  ///< (tokens, rank + rope), on their way into an FP8 cache
    Buffer index_k, index_q, index_weights, index_values, index_scaled_weights, index_workspace;
    Buffer selection;  ///< (tokens, index_topk) int32: slots that the last indexer chose, then -1
  } buffers;

 private:
  std::int64_t padded(std::int64_t num_tokens) const;
  static void pad(Step& next, std::int64_t num_tokens);
  bool has_to_select(const Step& next) const;
  std::int64_t count_tokens_per_request(const Step& next, std::int64_t unpadded) const;
  void reserve_index(std::int64_t tokens);
  void grow_step_buffers(std::int64_t tokens, std::int64_t absorbed, std::int64_t logit_rows);
  DecodeScheduleView schedule_view(const ScheduleOptions& options, std::int64_t requests) const;

  bool selects_ = false;
  std::int64_t tokens_per_request_ = 1;
  std::int64_t widest_e4m3_ = 0;      // columns
  ScheduleOptions schedule_options_;  // of batches of any size: no other has more parts
  StepUploader uploader_;
  PinnedBuffer download_;
  Buffer inv_freq_, cosines_, sines_, parts_, num_splits_;
};

inline const float* floats(const Buffer& buffer) {
  return buffer.bytes() > 0 ? reinterpret_cast<const float*>(buffer.data()) : nullptr;
}

/// A dense array on the GPU.
inline TensorView on_device(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<void*>(data), dtype, shape, {DeviceType::kCuda, 0});
}

/// Whether decode attention of such a model has a kernel for Hopper; else a plain one takes it.
inline bool has_sm90_decode(const ModelConfig& config) {
  return config.kv_lora_rank == 512 && config.qk_rope_head_dim == 64;
}
/// The same of prefill attention.
bool has_sm90_prefill(const ModelConfig& config);

/// Scores of an indexer that are kept at a time; at least those of one token are.
inline constexpr std::size_t kIndexLogitsBytes = std::size_t{256} << 20;

}  // namespace flash_mla::model
