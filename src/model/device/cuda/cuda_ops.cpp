#include "model/device/cuda/cuda_ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "base/cuda/check.h"
#include "base/parallel.h"
#include "flash_mla/decode.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/gemm/sm90/cublaslt.h"
#include "kernels/gemm/sm90/head_gemm.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/moe/sm90/norm_route.h"
#include "kernels/rows/sm90/rows.h"
#include "kernels/sampling/sm90/draw_rows.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/one_token_config.h"
#include "model/device/cuda/step_data.h"
#include "model/model.h"
#include "model/rope.h"
#include "model/weights.h"

namespace flash_mla::model {
namespace {

using namespace cuda;
using namespace sm90;

constexpr DType kType = DType::kBFloat16;
constexpr std::size_t kElement = 2;
// Rows up to which a product is a matter of reading the weights.
constexpr std::int64_t kSkinnyRows = 64;
// Tokens of the largest step that is recorded.
constexpr std::int64_t kMostRecordedTokens = 256;
// Blocks of 64 keys between the fixed split points of a batch-invariant step.
constexpr int kInvariantSplitBlocks = 16;
// Of the keys and values that prefill attention expands at a time.
constexpr std::int64_t kMostExpandedBytes = std::int64_t{1} << 31;
// Standard deviation of made-up weights: that of DeepSeek's own initialisation is 0.006, of others 0.02.
constexpr float kRandomDeviation = 0.02f;
constexpr std::size_t kStagingBytes = std::size_t{32} << 20;

struct CudaLinear : Linear {
  Buffer weight;
  Buffer bias;  // empty: none
  std::int64_t out_features = 0, in_features = 0;
};

struct CudaHeadLinear : HeadLinear {
  Buffer weight;
  std::int64_t heads = 0, out_features = 0, in_features = 0;
};

struct CudaExperts : Experts {
  Buffer gate_up, down;
  int num_experts = 0;
  std::int64_t intermediate = 0;
};

const float* floats(const Buffer& buffer) {
  return buffer.bytes() > 0 ? reinterpret_cast<const float*>(buffer.data()) : nullptr;
}

TensorView on_device(const void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return TensorView::contiguous(const_cast<void*>(data), dtype, shape, {DeviceType::kCuda, 0});
}

Matrix dense(const Buffer& buffer, std::int64_t rows, std::int64_t columns) {
  return {buffer.data(), kType, rows, columns, columns};
}

/// A recorded step.
class Graph {
 public:
  explicit Graph(cudaGraph_t graph) {
    const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    check(error, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(exec_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "cudaGraphLaunch"); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Device time of steps, of which several may be on their way.
class StepTimer {
 public:
  StepTimer() {
    for (Span& span : spans_) {
      check(cudaEventCreate(&span.begin), "cudaEventCreate");
      check(cudaEventCreate(&span.end), "cudaEventCreate");
    }
  }
  ~StepTimer() {
    for (const Span& span : spans_) {
      cudaEventDestroy(span.begin);
      cudaEventDestroy(span.end);
    }
  }
  StepTimer(const StepTimer&) = delete;
  StepTimer& operator=(const StepTimer&) = delete;

  void begin(cudaStream_t stream) {
    Span& span = spans_[next_];
    if (span.pending) check(cudaEventSynchronize(span.end), "cudaEventSynchronize");
    add(span);
    check(cudaEventRecord(span.begin, stream), "cudaEventRecord");
  }
  void end(cudaStream_t stream) {
    Span& span = spans_[next_];
    check(cudaEventRecord(span.end, stream), "cudaEventRecord");
    span.pending = true;
    next_ = (next_ + 1) % kSpans;
  }
  /// Of the steps that have run.
  double seconds() {
    for (Span& span : spans_) {
      if (span.pending && cudaEventQuery(span.end) == cudaSuccess) add(span);
    }
    return seconds_;
  }

 private:
  struct Span {
    cudaEvent_t begin = nullptr, end = nullptr;
    bool pending = false;
  };
  static constexpr std::size_t kSpans = 4;

  void add(Span& span) {
    if (!std::exchange(span.pending, false)) return;
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, span.begin, span.end), "cudaEventElapsedTime");
    seconds_ += static_cast<double>(milliseconds) * 1e-3;
  }

  Span spans_[kSpans];
  std::size_t next_ = 0;
  double seconds_ = 0;
};

/// Weights of the host to the device, through page-locked memory: while one half of it is being sent the
/// other is filled.
class WeightUploader {
 public:
  struct Part {
    std::byte* out = nullptr;  // on the device
    std::size_t bytes = 0;
  };

  explicit WeightUploader(cudaStream_t stream) : stream_(stream) {
    for (Half& half : halves_) {
      half.host.grow(kStagingBytes);
      check(cudaEventCreateWithFlags(&half.sent, cudaEventDisableTiming), "cudaEventCreate");
    }
  }
  ~WeightUploader() {
    for (Half& half : halves_) {
      cudaEventSynchronize(half.sent);
      cudaEventDestroy(half.sent);
    }
  }
  WeightUploader(const WeightUploader&) = delete;
  WeightUploader& operator=(const WeightUploader&) = delete;

  /// `fill(host)` writes the parts' bytes, one part behind the other.
  template <class Fill>
  void upload(std::initializer_list<Part> parts, const Fill& fill) {
    Half& half = halves_[next_++ % 2];
    check(cudaEventSynchronize(half.sent), "cudaEventSynchronize");
    std::size_t bytes = 0;
    for (const Part& part : parts) bytes += part.bytes;
    const std::byte* host = half.host.grow(bytes);
    fill(half.host.data());
    for (const Part& part : parts) {
      check(cudaMemcpyAsync(part.out, host, part.bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
      host += part.bytes;
    }
    check(cudaEventRecord(half.sent, stream_), "cudaEventRecord");
  }

  void upload(const std::byte* data, std::size_t bytes, std::byte* out) {
    for (std::size_t begin = 0; begin < bytes; begin += kStagingBytes) {
      const std::size_t size = std::min(kStagingBytes, bytes - begin);
      upload({{out + begin, size}}, [&](std::byte* host) { copy(data + begin, size, host); });
    }
  }

 private:
  struct Half {
    PinnedBuffer host;
    cudaEvent_t sent = nullptr;
  };

  // One core copies far slower than the bus.
  static void copy(const std::byte* from, std::size_t bytes, std::byte* to) {
    constexpr std::size_t kPiece = std::size_t{1} << 20;
    const auto pieces = static_cast<std::int64_t>((bytes + kPiece - 1) / kPiece);
    parallel_for(pieces, pieces >= 4 ? default_threads() : 1, [&](std::int64_t i) {
      const std::size_t begin = static_cast<std::size_t>(i) * kPiece;
      std::memcpy(to + begin, from + begin, std::min(kPiece, bytes - begin));
    });
  }

  Half halves_[2];
  std::size_t next_ = 0;
  cudaStream_t stream_;
};

class CudaOps : public Ops {
 public:
  CudaOps(const ModelConfig& config, bool time_steps)
      : config_(config),
        pool_(std::make_shared<DevicePool>()),
        schedule_options_(cuda_schedule_options(0, 1, config.num_attention_heads, 1)) {
    const Rope rope = make_rope(config);
    inv_freq_ = make_vector(rope.inv_freq);
    rotations_.inv_freq = floats(inv_freq_);
    rotations_.scale = rope.scale;
    rotations_.pairs = config.qk_rope_head_dim / 2;
    parts_ = allocate(static_cast<std::size_t>(schedule_options_.num_parts) * sizeof(DecodePart));
    if (fits_one_token(config)) {
      one_token_workspace_ = allocate(one_token_workspace_size());
      check(cudaMemsetAsync(one_token_workspace_.data(), 0, one_token_workspace_size(), stream_),
            "cudaMemsetAsync");
    }
    if (time_steps) timer_ = std::make_unique<StepTimer>();
  }
  ~CudaOps() override { cudaStreamSynchronize(stream_); }

  double device_seconds() const override { return timer_ ? timer_->seconds() : 0; }

  DType dtype() const override { return kType; }

  std::size_t free_memory() const override { return pool_->free_memory(); }
  // In a batch-invariant step nothing depends on how many sequences there are.
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    if (!batch_invariant) return cuda_schedule_options(0, 1, config_.num_attention_heads, 1, sequences);
    ScheduleOptions options = schedule_options_;
    options.fixed_split_blocks = kInvariantSplitBlocks;
    return options;
  }

  bool makes_up_weights() const override { return true; }
  bool takes_bfloat16() const override { return true; }

  Buffer allocate(std::size_t bytes) override { return pool_->allocate(bytes); }

  std::int64_t padded(std::int64_t tokens) const override {
    if (tokens > kMostRecordedTokens) return tokens;
    std::int64_t size = 1;
    while (size < tokens && size < 8) size *= 2;
    return std::max(size, (tokens + 7) / 8 * 8 * (tokens > 8));
  }

  void reserve(std::int64_t num_tokens) override {
    const std::int64_t recorded = std::min(num_tokens, kMostRecordedTokens);
    grow_step_buffers(num_tokens, recorded, recorded);
    if (config_.n_routed_experts > 0) {
      const std::int64_t hidden = config_.hidden_size, intermediate = config_.moe_intermediate_size;
      grow(router_logits_, static_cast<std::size_t>(num_tokens * config_.n_routed_experts) * sizeof(float));
      grow(expert_workspace_, expert_ffn_workspace_size(num_tokens, hidden, intermediate,
                                                        config_.n_routed_experts + config_.n_shared_experts,
                                                        experts_per_token()));
    }
    // Prompts that are processed whole.
    grow_prefill_buffers(num_tokens);
    weights_.reset();
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  }

  Buffer make_vector(std::span<const float> values) override {
    Buffer out = allocate(values.size_bytes());
    check(cudaMemcpyAsync(out.data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    return out;
  }

  Buffer make_table(HostWeight values, std::int64_t rows, std::int64_t columns) override {
    return make_weight(values, rows * columns);
  }

  std::unique_ptr<Linear> make_linear(HostWeight weight, std::int64_t out_features, std::int64_t in_features,
                                      std::span<const float> bias) override {
    auto out = std::make_unique<CudaLinear>();
    out->weight = make_weight(weight, out_features * in_features);
    if (!bias.empty()) out->bias = make_vector(bias);
    out->out_features = out_features;
    out->in_features = in_features;
    return out;
  }

  std::unique_ptr<Linear> make_router(const float* weight, std::int64_t num_experts,
                                      std::int64_t in_features) override {
    auto out = std::make_unique<CudaLinear>();
    const auto count = static_cast<std::size_t>(num_experts * in_features);
    if (weight != nullptr) {
      out->weight = make_vector({weight, count});
    } else {
      out->weight = allocate(count * sizeof(float));
      fill_random(out->weight.data(), DType::kFloat32, static_cast<std::int64_t>(count), seed_++,
                  kRandomDeviation, stream_);
    }
    out->out_features = num_experts;
    out->in_features = in_features;
    return out;
  }

  std::unique_ptr<HeadLinear> make_head_linear(HostWeight weight, std::int64_t heads,
                                               std::int64_t out_features, std::int64_t in_features) override {
    auto out = std::make_unique<CudaHeadLinear>();
    out->weight = make_weight(weight, heads * out_features * in_features);
    out->heads = heads;
    out->out_features = out_features;
    out->in_features = in_features;
    return out;
  }

  std::unique_ptr<Experts> make_experts(int num_experts, std::int64_t hidden, std::int64_t intermediate,
                                        const std::function<void(int, void*, void*)>& read) override {
    auto out = std::make_unique<CudaExperts>();
    out->num_experts = num_experts;
    out->intermediate = intermediate;
    const std::int64_t down_size = hidden * intermediate, gate_up_size = 2 * down_size;
    if (!read) {
      out->gate_up = make_weight(nullptr, num_experts * gate_up_size);
      out->down = make_weight(nullptr, num_experts * down_size);
      return out;
    }
    const std::size_t down_bytes = static_cast<std::size_t>(down_size) * kElement,
                      gate_up_bytes = 2 * down_bytes;
    out->gate_up = allocate(static_cast<std::size_t>(num_experts) * gate_up_bytes);
    out->down = allocate(static_cast<std::size_t>(num_experts) * down_bytes);
    for (int e = 0; e < num_experts; ++e) {
      const auto expert = static_cast<std::size_t>(e);
      uploader().upload({{out->gate_up.data() + expert * gate_up_bytes, gate_up_bytes},
                         {out->down.data() + expert * down_bytes, down_bytes}},
                        [&](std::byte* host) { read(e, host, host + gate_up_bytes); });
    }
    return out;
  }

  void begin_step(Step& step) override {
    recorded_ = step.chunks.empty() && step.num_tokens() <= kMostRecordedTokens;
    if (recorded_) pad(step);
    step_ = &step;
    grow_step_buffers(step.num_tokens(), step.num_absorbed, std::ssize(step.logit_rows));
    const std::int64_t key_bytes = std::int64_t{config_.num_attention_heads} *
                                   (config_.qk_nope_head_dim + config_.v_head_dim) *
                                   static_cast<std::int64_t>(kElement);
    data_ = uploader_.upload(step, kMostExpandedBytes / key_bytes, *pool_, stream_);
  }

  void run(const std::function<void()>& layers) override {
    if (timer_) timer_->begin(stream_);
    run_step(layers);
    if (timer_) timer_->end(stream_);
  }

  bool run_layers(const Weights& weights, std::span<const Buffer> caches, std::span<const Buffer> ids,
                  Matrix x) override {
    if (!one_token_step()) return false;
    OneToken args = one_token_of(config_);
    args.softmax_scale = static_cast<float>(config_.softmax_scale());
    args.cosines = rotations_.cosines;
    args.sines = rotations_.sines;
    args.slot = data_.slots;
    args.len = data_.lens;
    args.table = data_.table;
    args.x = x.data;
    args.workspace = one_token_workspace_.data();
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      args.layers[i] = one_token_layer(weights.layers[i], caches[i], ids[i]);
    }
    check(one_token(args, stream_), "one_token");
    return true;
  }

  void embed(const Buffer& table, const Buffer& tokens, Matrix out) override {
    sm90::embed(table.data(), data_.token_ids, reinterpret_cast<const std::int32_t*>(tokens.data()),
                data_.positions, rotations_, out, stream_);
  }

  void rms_norm(Matrix x, const Buffer& weight, double eps, Matrix out) override {
    sm90::rms_norm(x, floats(weight), static_cast<float>(eps), out, stream_);
  }

  void linear(Matrix x, const Linear& weight, Matrix out) override { multiply(x, weight, out, false); }
  void linear_add(Matrix x, const Linear& weight, Matrix inout) override { multiply(x, weight, inout, true); }

  void linear_silu_mul(Matrix x, const Linear& weight, Matrix out) override {
    const auto& linear = static_cast<const CudaLinear&>(weight);
    if (few_rows(x)) {
      SkinnyGemm args = skinny_args(x, linear, out);
      args.silu_mul = true;
      check(skinny_gemm(args, stream_), "skinny_gemm");
      return;
    }
    grow(gate_up_, static_cast<std::size_t>(x.rows * linear.out_features) * kElement);
    const Matrix gate_up = dense(gate_up_, x.rows, linear.out_features);
    multiply(x, weight, gate_up, false);
    sm90::silu_mul(gate_up, out, stream_);
  }

  void rope_and_append(Matrix q, Matrix kv, std::int64_t first_token, const Buffer& kv_norm, double eps,
                       const Buffer& cache) override {
    RopeAndAppend args;
    args.q = q;
    args.kv = kv;
    args.kv_norm = floats(kv_norm);
    args.eps = static_cast<float>(eps);
    args.slots = data_.slots + first_token;
    args.rotations = rotations_;
    args.rotations.cosines += first_token * rotations_.pairs;
    args.rotations.sines += first_token * rotations_.pairs;
    args.cache = cache.data();
    args.heads = config_.num_attention_heads;
    args.nope = config_.qk_nope_head_dim;
    args.rope = config_.qk_rope_head_dim;
    args.rank = config_.kv_lora_rank;
    sm90::rope_and_append(args, stream_);
  }

  void absorb_queries(Matrix q, const HeadLinear& w_uk, Matrix q_latent) override {
    const auto& weight = static_cast<const CudaHeadLinear&>(w_uk);
    HeadGemm args = head_args(q, weight, q_latent);
    args.tail = config_.qk_rope_head_dim;
    args.x_width = args.in_features + args.tail;
    args.out_width = args.out_features + args.tail;
    head_gemm(args, stream_);
  }

  void append_and_absorb(Matrix q, Matrix kv, const Buffer& kv_norm, double eps, const Buffer& cache,
                         const HeadLinear& w_uk, Matrix q_latent) override {
    HeadGemm args = head_args(q, static_cast<const CudaHeadLinear&>(w_uk), q_latent);
    args.tail = config_.qk_rope_head_dim;
    args.x_width = args.in_features + args.tail;
    args.out_width = args.out_features + args.tail;
    args.cosines = rotations_.cosines;
    args.sines = rotations_.sines;
    args.append.kv = kv;
    args.append.norm = floats(kv_norm);
    args.append.eps = static_cast<float>(eps);
    args.append.slots = data_.slots;
    args.append.cache = cache.data();
    args.append.rank = config_.kv_lora_rank;
    head_gemm(args, stream_);
  }

  void decode_attention(Matrix q_latent, const Buffer& cache, Matrix out_latent) override {
    const std::int64_t n = step_->num_absorbed, heads = config_.num_attention_heads;
    const std::int64_t rank = config_.kv_lora_rank, width = rank + config_.qk_rope_head_dim;
    if (!sm90_decode()) {
      PlainDecode args;
      args.q = q_latent;
      args.out = out_latent;
      args.cache = cache.data();
      args.lens = data_.lens;
      args.table = data_.table;
      args.max_blocks = data_.max_blocks;
      args.heads = config_.num_attention_heads;
      args.rank = config_.kv_lora_rank;
      args.rope = config_.qk_rope_head_dim;
      args.scale = static_cast<float>(config_.softmax_scale());
      plain_decode(args, stream_);
      return;
    }
    const auto pages =
        static_cast<std::int64_t>(cache.bytes() / kElement) / (std::int64_t{kPageSize} * width);
    DenseDecodeArgs args;
    args.q = on_device(q_latent.data, kType, {n, 1, heads, width});
    args.k_cache = on_device(cache.data(), kType, {pages, kPageSize, 1, width});
    args.block_table = on_device(data_.table, DType::kInt32, {n, data_.max_blocks});
    args.cache_seqlens = on_device(data_.lens, DType::kInt32, {n});
    args.out = on_device(out_latent.data, kType, {n, 1, heads, rank});
    DenseDecodeOptions options;
    options.softmax_scale = static_cast<float>(config_.softmax_scale());
    options.stream = stream_;
    const std::size_t bytes = dense_decode_workspace_size(args, schedule_, options);
    grow(decode_workspace_, bytes);
    dense_decode(args, schedule_, decode_workspace_.data(), bytes, options);
  }

  void expand_values(Matrix out_latent, const HeadLinear& w_uv, Matrix out) override {
    const auto& weight = static_cast<const CudaHeadLinear&>(w_uv);
    HeadGemm args = head_args(out_latent, weight, out);
    args.x_width = args.in_features;
    args.out_width = args.out_features;
    head_gemm(args, stream_);
  }

  void prefill_attention(Matrix q, const Buffer& cache, const Linear& kv_b, Matrix out) override {
    const auto& weight = static_cast<const CudaLinear&>(kv_b);
    for (const StepData::Group& group : data_.groups) {
      grow_prefill_buffers(group.num_keys);
      GatherKeys keys;
      keys.cache = cache.data();
      keys.starts = group.key_starts;
      keys.tables = group.tables;
      keys.pages = group.pages;
      keys.num_seqs = group.num_seqs;
      keys.num_keys = group.num_keys;
      keys.rank = config_.kv_lora_rank;
      keys.rope = config_.qk_rope_head_dim;
      keys.latents = latents_.data();
      keys.k_rope = k_rope_.data();
      gather_keys(keys, stream_);
      multiply(dense(latents_, group.num_keys, config_.kv_lora_rank), weight,
               dense(expanded_, group.num_keys, weight.out_features), false);

      if (sm90_prefill()) {
        attend_sm90(group, q.row_range(group.first_query, group.num_queries),
                    out.row_range(group.first_query, group.num_queries));
        continue;
      }
      PlainPrefill args;
      args.q = q.row_range(group.first_query, group.num_queries);
      args.out = out.row_range(group.first_query, group.num_queries);
      args.expanded = expanded_.data();
      args.k_rope = k_rope_.data();
      args.query_starts = group.query_starts;
      args.key_starts = group.key_starts;
      args.num_seqs = group.num_seqs;
      args.heads = config_.num_attention_heads;
      args.nope = config_.qk_nope_head_dim;
      args.rope = config_.qk_rope_head_dim;
      args.v = config_.v_head_dim;
      args.scale = static_cast<float>(config_.softmax_scale());
      plain_prefill(args, stream_);
    }
  }

  void route(Matrix x, const Linear& router, const Buffer& bias, const Buffer& ids,
             const Buffer& weights) override {
    check(sm90::route(route_args(x, router, bias, ids, weights), stream_), "route");
  }

  void norm_and_route(Matrix x, const Buffer& norm, double eps, Matrix h, const Linear& router,
                      const Buffer& bias, const Buffer& ids, const Buffer& weights) override {
    NormAndRoute args;
    args.route = route_args(h, router, bias, ids, weights);
    args.in = x.data;
    args.in_stride = x.stride;
    args.norm = floats(norm);
    args.eps = static_cast<float>(eps);
    if (fits_norm_and_route(args)) {
      sm90::norm_and_route(args, stream_);
      return;
    }
    rms_norm(x, norm, eps, h);
    check(sm90::route(args.route, stream_), "route");
  }

  bool folds_shared_experts() const override { return true; }

  void experts_add(Matrix x, const Experts& experts, const Buffer& ids, const Buffer& weights,
                   Matrix inout) override {
    ExpertFfn args = expert_args(x, experts, ids, weights, inout);
    check(expert_ffn(args, stream_), "expert_ffn");
  }

  void experts_add_and_norm(Matrix h, const Experts& experts, const Buffer& ids, const Buffer& weights,
                            Matrix inout, const Buffer& norm, double eps) override {
    ExpertFfn args = expert_args(h, experts, ids, weights, inout);
    args.norm = floats(norm);
    args.norm_eps = static_cast<float>(eps);
    args.norm_out = h.data;
    args.norm_stride = h.stride;
    check(expert_ffn(args, stream_), "expert_ffn");
  }

  void gather_logit_rows(Matrix x, Matrix out) override { gather(x, data_.logit_rows, out, stream_); }

  void copy(const Buffer& buffer, std::size_t source, std::size_t target, std::size_t bytes) override {
    check(cudaMemcpyAsync(buffer.data() + target, buffer.data() + source, bytes, cudaMemcpyDeviceToDevice,
                          stream_),
          "cudaMemcpyAsync");
  }

  void choose(Matrix logits, const Buffer& tokens) override {
    auto* out = reinterpret_cast<std::int32_t*>(tokens.data());
    likeliest(logits, out, likeliest_scratch_.data(), stream_);
    if (!step_->draws.empty()) draw_rows(logits, data_.draws, out, stream_);
  }

  void download(const std::byte* data, std::size_t bytes, void* host) override {
    std::byte* staging = download_.grow(bytes);
    check(cudaMemcpyAsync(staging, data, bytes, cudaMemcpyDeviceToHost, stream_), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    std::memcpy(host, staging, bytes);
  }

  std::unique_ptr<Download> start_download(const std::byte* data, std::size_t bytes) override {
    return downloader_.start(data, bytes, stream_);
  }

  bool queues() const override { return true; }

 private:
  // Tokens, width of the block table, batch-invariant, whether any token is drawn.
  using Key = std::tuple<std::int64_t, std::int64_t, bool, bool>;

  void run_step(const std::function<void()>& layers) {
    if (!recorded_) {
      plan_decode();
      layers();
      return;
    }
    if (allocations_ != pool_->allocations()) {
      graphs_.clear();  // what they point to may have moved
      allocations_ = pool_->allocations();
    }
    const Key key{step_->num_tokens(), data_.max_blocks, step_->batch_invariant, !step_->draws.empty()};
    if (const auto found = graphs_.find(key); found != graphs_.end()) {
      found->second.launch(stream_);
      return;
    }
    // Whatever the step allocates or looks up for the first time, it does now.
    plan_decode();
    layers();
    if (allocations_ != pool_->allocations()) {
      graphs_.clear();
      allocations_ = pool_->allocations();
    }
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      plan_decode();
      layers();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    graphs_.try_emplace(key, graph);
  }

  bool sm90_decode() const { return config_.kv_lora_rank == 512 && config_.qk_rope_head_dim == 64; }

  bool sm90_prefill() const {
    return config_.qk_nope_head_dim == sm90::kPrefillHeadDimNope &&
           config_.qk_rope_head_dim == sm90::kPrefillHeadDimRope &&
           config_.v_head_dim == sm90::kPrefillHeadDimV;
  }

  // Of the expanded keys and values of a group.
  void attend_sm90(const StepData::Group& group, const Matrix& q, const Matrix& out) {
    const std::int64_t heads = config_.num_attention_heads, nope = config_.qk_nope_head_dim;
    const std::int64_t rope = config_.qk_rope_head_dim, v = config_.v_head_dim;
    sm90::DensePrefillArgs args;
    args.q = on_device(q.data, kType, {q.rows, heads, nope + rope});
    args.q.strides[0] = q.stride;
    args.k_nope = on_device(expanded_.data(), kType, {group.num_keys, heads, nope});
    args.k_nope.strides = {heads * (nope + v), nope + v, 1};
    args.v = on_device(expanded_.data() + static_cast<std::size_t>(nope) * kElement, kType,
                       {group.num_keys, heads, v});
    args.v.strides = args.k_nope.strides;
    args.k_rope = on_device(k_rope_.data(), kType, {group.num_keys, rope});
    args.cu_seqlens_q = on_device(group.query_starts, DType::kInt32, {group.num_seqs + 1});
    args.cu_seqlens_k = on_device(group.key_starts, DType::kInt32, {group.num_seqs + 1});
    args.out = on_device(out.data, kType, {out.rows, heads, v});
    grow(prefill_workspace_, sm90::dense_prefill_workspace_size());
    sm90::dense_prefill(args, static_cast<float>(config_.softmax_scale()), /*causal=*/true,
                        prefill_workspace_.data(), stream_);
  }

  // Folded shared ones counted in.
  int experts_per_token() const { return config_.num_experts_per_tok + config_.n_shared_experts; }

  RouteArgs route_args(const Matrix& x, const Linear& router, const Buffer& bias, const Buffer& ids,
                       const Buffer& weights) {
    grow(router_logits_, static_cast<std::size_t>(x.rows * config_.n_routed_experts) * sizeof(float));
    RouteArgs args;
    args.x = x.data;
    args.x_stride = x.stride;
    args.router = floats(static_cast<const CudaLinear&>(router).weight);
    args.correction = floats(bias);
    args.logits = reinterpret_cast<float*>(router_logits_.data());
    args.ids = reinterpret_cast<std::int32_t*>(ids.data());
    args.weights = reinterpret_cast<float*>(weights.data());
    args.tokens = x.rows;
    args.hidden = x.columns;
    args.routing = config_.routing();
    args.batch_invariant = step_->batch_invariant;
    args.programmatic_launch = true;
    return args;
  }

  ExpertFfn expert_args(const Matrix& x, const Experts& all, const Buffer& ids, const Buffer& weights,
                        const Matrix& inout) {
    const auto& experts = static_cast<const CudaExperts&>(all);
    grow(expert_workspace_, expert_ffn_workspace_size(x.rows, x.columns, experts.intermediate,
                                                      experts.num_experts, experts_per_token()));
    ExpertFfn args;
    args.x = x.data;
    args.x_stride = x.stride;
    args.gate_up = experts.gate_up.data();
    args.down = experts.down.data();
    args.ids = reinterpret_cast<const std::int32_t*>(ids.data());
    args.weights = reinterpret_cast<const float*>(weights.data());
    args.inout = inout.data;
    args.inout_stride = inout.stride;
    args.tokens = x.rows;
    args.hidden = x.columns;
    args.intermediate = experts.intermediate;
    args.num_experts = experts.num_experts;
    args.experts_per_token = experts_per_token();
    args.workspace = expert_workspace_.data();
    args.batch_invariant = step_->batch_invariant;
    args.programmatic_launch = true;
    return args;
  }

  WeightUploader& uploader() {
    if (!weights_) weights_ = std::make_unique<WeightUploader>(stream_);
    return *weights_;
  }

  Buffer make_weight(HostWeight values, std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * kElement;
    Buffer out = allocate(bytes);
    if (values.data != nullptr) {
      if (values.dtype != kType) throw std::logic_error("a weight is float32, expected bfloat16");
      uploader().upload(static_cast<const std::byte*>(values.data), bytes, out.data());
    } else {
      fill_random(out.data(), kType, count, seed_++, kRandomDeviation, stream_);
    }
    return out;
  }

  void grow(Buffer& buffer, std::size_t bytes) {
    if (bytes > buffer.bytes()) {
      buffer = {};
      buffer = allocate(bytes);
    }
  }

  void grow_step_buffers(std::int64_t tokens, std::int64_t absorbed, std::int64_t logit_rows) {
    const auto pairs = static_cast<std::size_t>(tokens * rotations_.pairs) * sizeof(float);
    grow(cosines_, pairs);
    grow(sines_, pairs);
    rotations_.cosines = reinterpret_cast<float*>(cosines_.data());
    rotations_.sines = reinterpret_cast<float*>(sines_.data());
    grow(num_splits_, static_cast<std::size_t>(absorbed + 1) * sizeof(std::int32_t));
    const std::size_t bytes = likeliest_scratch_bytes(logit_rows);
    if (bytes > likeliest_scratch_.bytes()) {
      grow(likeliest_scratch_, bytes);
      check(cudaMemsetAsync(likeliest_scratch_.data(), 0, bytes, stream_), "cudaMemsetAsync");
    }
  }

  void grow_prefill_buffers(std::int64_t keys) {
    const auto bytes = [&](std::int64_t columns) {
      return static_cast<std::size_t>(keys * columns) * kElement;
    };
    grow(latents_, bytes(config_.kv_lora_rank));
    grow(k_rope_, bytes(config_.qk_rope_head_dim));
    grow(expanded_,
         bytes(std::int64_t{config_.num_attention_heads} * (config_.qk_nope_head_dim + config_.v_head_dim)));
  }

  // To a size that is recorded: with tokens that see no key and are not cached, and with logits for all.
  void pad(Step& step) const {
    const auto size = static_cast<std::size_t>(padded(step.num_tokens()));
    step.token_ids.resize(size, 0);
    step.positions.resize(size, 0);
    step.slots.resize(size, -1);
    step.absorbed_lens.resize(size, 0);
    step.absorbed_table.resize(size * static_cast<std::size_t>(step.max_blocks), 0);
    step.num_absorbed = static_cast<std::int64_t>(size);
    step.logit_rows.resize(size, 0);
    step.first_chosen = 0;
    if (!step.draws.empty()) step.draws.resize(size);
  }

  DecodeScheduleView schedule_view(const ScheduleOptions& options) const {
    DecodeScheduleView view;
    view.parts = on_device(parts_.data(), DType::kInt32, {options.num_parts, 8});
    view.num_splits = on_device(num_splits_.data(), DType::kInt32, {step_->num_absorbed + 1});
    view.block_size = options.block_size;
    view.fixed_split_blocks = options.fixed_split_blocks;
    return view;
  }

  // Steps that one kernel does. Not batch-invariant ones: larger batches take other kernels.
  bool one_token_step() const {
    return one_token_workspace_.bytes() > 0 && recorded_ && step_->num_tokens() == 1 &&
           !step_->batch_invariant;
  }

  static OneTokenLayer one_token_layer(const Layer& layer, const Buffer& cache, const Buffer& ids) {
    const auto weight = [](const auto& linear) { return linear.weight.data(); };
    const auto linear = [&](const std::unique_ptr<Linear>& l) {
      return weight(static_cast<const CudaLinear&>(*l));
    };
    const auto heads = [&](const std::unique_ptr<HeadLinear>& l) {
      return weight(static_cast<const CudaHeadLinear&>(*l));
    };
    OneTokenLayer out;
    out.qkv = linear(layer.attention.qkv_a);
    out.w_uk = heads(layer.attention.w_uk);
    out.w_uv = heads(layer.attention.w_uv);
    out.o = linear(layer.attention.o);
    out.input_norm = floats(layer.input_norm);
    out.post_attention_norm = floats(layer.post_attention_norm);
    out.kv_norm = floats(layer.attention.kv_norm);
    out.cache = cache.data();
    if (layer.moe.router != nullptr) {
      const auto& experts = static_cast<const CudaExperts&>(*layer.moe.experts);
      out.router = reinterpret_cast<const float*>(linear(layer.moe.router));
      out.correction = floats(layer.moe.correction_bias);
      out.gate_up = experts.gate_up.data();
      out.down = experts.down.data();
      out.ids = reinterpret_cast<std::int32_t*>(ids.data());
    } else {
      out.gate_up = linear(layer.dense.gate_up);
      out.down = linear(layer.dense.down);
    }
    return out;
  }

  void plan_decode() {
    if (step_->num_absorbed == 0 || !sm90_decode() || one_token_step()) return;
    // Of the step's absorbed tokens, each a request.
    const ScheduleOptions options =
        schedule_options(static_cast<int>(step_->num_absorbed), step_->batch_invariant);
    schedule_ = schedule_view(options);
    build_decode_schedule(on_device(data_.lens, DType::kInt32, {step_->num_absorbed}), options, schedule_,
                          stream_);
  }

  // Batch-invariant products are all made by the kernel that can do it.
  bool few_rows(const Matrix& x) const { return x.rows <= kSkinnyRows || step_->batch_invariant; }

  SkinnyGemm skinny_args(const Matrix& x, const CudaLinear& linear, const Matrix& out) const {
    SkinnyGemm args;
    args.x = x.data;
    args.x_stride = x.stride;
    args.weight = linear.weight.data();
    args.bias = floats(linear.bias);
    args.out = out.data;
    args.out_stride = out.stride;
    args.m = x.rows;
    args.n = linear.out_features;
    args.k = linear.in_features;
    args.out_fp32 = out.dtype == DType::kFloat32;
    args.batch_invariant = step_->batch_invariant;
    args.programmatic_launch = true;
    return args;
  }

  void multiply(Matrix x, const Linear& weight, Matrix out, bool accumulate) {
    const auto& linear = static_cast<const CudaLinear&>(weight);
    if (few_rows(x)) {
      SkinnyGemm args = skinny_args(x, linear, out);
      args.accumulate = accumulate;
      check(skinny_gemm(args, stream_), "skinny_gemm");
      return;
    }
    if (linear.bias.bytes() > 0) {
      add_bias(floats(linear.bias), !accumulate, out, stream_);
      accumulate = true;
    }
    lt_.gemm(x, linear.weight.data(), out, accumulate, stream_);
  }

  HeadGemm head_args(const Matrix& x, const CudaHeadLinear& weight, const Matrix& out) const {
    HeadGemm args;
    args.x = x;
    args.out = out;
    args.weight = weight.weight.data();
    args.heads = static_cast<int>(weight.heads);
    args.out_features = static_cast<int>(weight.out_features);
    args.in_features = static_cast<int>(weight.in_features);
    return args;
  }

  ModelConfig config_;
  Stream stream_;
  std::shared_ptr<DevicePool> pool_;
  ScheduleOptions schedule_options_;  // of batches of any size: no other has more parts
  DecodeScheduleView schedule_;       // of the step
  CublasLt lt_;
  StepUploader uploader_;
  std::unique_ptr<WeightUploader> weights_;
  std::unique_ptr<StepTimer> timer_;  // or null
  std::uint64_t seed_ = 1;

  RotationTable rotations_;
  Buffer inv_freq_, cosines_, sines_, parts_, num_splits_, decode_workspace_, prefill_workspace_;
  Buffer gate_up_, latents_, k_rope_, expanded_, router_logits_, expert_workspace_, likeliest_scratch_,
      one_token_workspace_;
  PinnedBuffer download_;
  Downloader downloader_;

  const Step* step_ = nullptr;
  StepData data_;
  bool recorded_ = false;  // the step is one of those that are replayed
  std::map<Key, Graph> graphs_;
  std::size_t allocations_ = 0;  // of the pool when graphs_ were made
};

}  // namespace

std::string why_no_cuda_ops() {
  if (sm90::gpus().empty()) return fmt::format("this machine has {}; use cpu", sm90::why_no_gpus());
  try {
    cuda_schedule_options(0, 1, 1, 1);
  } catch (const std::exception& e) {
    return e.what();
  }
  return why_no_cublaslt();
}

std::unique_ptr<Ops> make_cuda_ops(const ModelConfig& config, bool time_steps) {
  if (const std::string why = why_no_cuda_ops(); !why.empty()) throw Unsupported("device cuda: " + why);
  return std::make_unique<CudaOps>(config, time_steps);
}

}  // namespace flash_mla::model
