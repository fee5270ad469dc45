#include "model/device/cpu/cpu_ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "base/aligned.h"
#include "base/parallel.h"
#include "flash_mla/decode.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_prefill/cpu/dense_prefill.h"
#include "kernels/gemm/cpu/gemm.h"
#include "kernels/moe/cpu/router.h"
#include "kernels/rows/cpu/rows.h"
#include "kernels/sampling/cpu/draw.h"
#include "model/model.h"
#include "model/rope.h"

namespace flash_mla::model {
namespace {

// Blocks of 64 keys between the fixed split points of a batch-invariant step.
constexpr int kInvariantSplitBlocks = 16;
// Elements below which a row-wise operation is not worth waking a second thread.
constexpr std::int64_t kParallelElements = 16384;
// Rows that a thread takes at a time: of the router, and at most of an expert. Multiples of 64, the largest
// tile of a product.
constexpr std::int64_t kBlockRows = 64;
constexpr std::int64_t kPieceRows = 128;

struct CpuLinear : Linear {
  PackedWeight weight;
  std::vector<float> bias;
};

struct CpuHeadLinear : HeadLinear {
  std::vector<PackedWeight> heads;
};

struct CpuExperts : Experts {
  struct Expert {
    PackedWeight gate_up, down;
  };
  std::vector<Expert> experts;
};

const float* floats(const Buffer& buffer) { return reinterpret_cast<const float*>(buffer.data()); }

/// Some of the rows of one expert.
struct Piece {
  std::size_t expert;
  std::int64_t first, count;
};

Matrix dense(std::byte* data, DType dtype, std::int64_t rows, std::int64_t columns) {
  return {data, dtype, rows, columns, columns};
}

std::int32_t likeliest(const float* logits, std::int64_t size) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float largest = -kInfinity;
  std::int64_t best = -1;
  bool bad = false;
  for (std::int64_t i = 0; i < size; ++i) {
    bad |= !(logits[i] < kInfinity);  // NaN, +inf
    if (logits[i] > largest) {
      largest = logits[i];
      best = i;
    }
  }
  return bad ? -1 : static_cast<std::int32_t>(best);
}

class CpuOps : public Ops {
 public:
  CpuOps(const ModelConfig& config, DType dtype, ModelQuantize quantize, int num_threads)
      : config_(config),
        rope_(make_rope(config)),
        dtype_(dtype),
        quantize_(quantize),
        threads_(num_threads) {}

  DType dtype() const override { return dtype_; }

  ScheduleOptions schedule_options(int /*sequences*/, bool batch_invariant) const override {
    ScheduleOptions options = cpu_schedule_options(threads_);
    if (batch_invariant) options.fixed_split_blocks = kInvariantSplitBlocks;
    return options;
  }

  Buffer allocate(std::size_t bytes) override { return allocate_aligned(bytes); }

  Buffer make_vector(std::span<const float> values) override {
    Buffer out = allocate_aligned(values.size_bytes());
    std::memcpy(out.data(), values.data(), values.size_bytes());
    return out;
  }

  Buffer make_table(HostWeight values, std::int64_t rows, std::int64_t columns) override {
    Buffer out = allocate_aligned(static_cast<std::size_t>(rows * columns) * dtype_size(dtype_));
    rows::narrow(values.float32(), out.data(), dtype_, rows * columns);
    return out;
  }

  std::unique_ptr<Linear> make_linear(HostWeight weight, std::int64_t out_features, std::int64_t in_features,
                                      std::span<const float> bias) override {
    auto out = std::make_unique<CpuLinear>();
    out->weight = pack(weight.float32(), out_features, in_features);
    out->bias.assign(bias.begin(), bias.end());
    return out;
  }

  std::unique_ptr<Linear> make_unquantized_linear(HostWeight weight, std::int64_t out_features,
                                                  std::int64_t in_features) override {
    auto out = std::make_unique<CpuLinear>();
    out->weight = gemm_.pack(weight.float32(), out_features, in_features, dtype_);
    return out;
  }

  std::unique_ptr<Linear> make_router(const float* weight, std::int64_t num_experts,
                                      std::int64_t in_features) override {
    auto out = std::make_unique<CpuLinear>();
    out->weight = gemm_.pack(weight, num_experts, in_features, DType::kFloat32);
    return out;
  }

  std::unique_ptr<HeadLinear> make_head_linear(HostWeight weight, std::int64_t heads,
                                               std::int64_t out_features, std::int64_t in_features) override {
    auto out = std::make_unique<CpuHeadLinear>();
    for (std::int64_t h = 0; h < heads; ++h) {
      out->heads.push_back(
          gemm_.pack(weight.float32() + h * out_features * in_features, out_features, in_features, dtype_));
    }
    return out;
  }

  std::unique_ptr<Experts> make_experts(int num_experts, std::int64_t hidden, std::int64_t intermediate,
                                        const std::function<void(int, void*, void*)>& read) override {
    auto out = std::make_unique<CpuExperts>();
    std::vector<float> gate_up(static_cast<std::size_t>(2 * intermediate * hidden));
    std::vector<float> down(static_cast<std::size_t>(hidden * intermediate));
    for (int e = 0; e < num_experts; ++e) {
      read(e, gate_up.data(), down.data());
      out->experts.push_back(
          {pack(gate_up.data(), 2 * intermediate, hidden), pack(down.data(), hidden, intermediate)});
    }
    return out;
  }

  bool narrows() const override { return true; }

  void begin_step(Step& step) override {
    step_ = &step;
    const std::size_t tokens = step.token_ids.size(), pairs = rope_.inv_freq.size();
    cosines_.resize(tokens * pairs);
    sines_.resize(tokens * pairs);
    // A cosine and a sine take as long as some 16 elements of other operations.
    for_rows(step.num_tokens(), static_cast<std::int64_t>(16 * pairs), [&](std::int64_t token) {
      const auto t = static_cast<std::size_t>(token);
      for (std::size_t i = 0; i < pairs; ++i) {
        const float angle = static_cast<float>(step.positions[t]) * rope_.inv_freq[i];
        cosines_[t * pairs + i] = std::cos(angle) * rope_.scale;
        sines_[t * pairs + i] = std::sin(angle) * rope_.scale;
      }
    });
    if (step.num_absorbed > 0) {
      schedule_ = DecodeSchedule::build(
          step.absorbed_lens, schedule_options(static_cast<int>(step.num_absorbed), step.batch_invariant));
    }
  }

  void embed(const Buffer& table, const Buffer& tokens, Matrix out) override {
    const auto bytes = static_cast<std::size_t>(out.columns) * dtype_size(dtype_);
    for_rows(out.rows, out.columns, [&](std::int64_t t) {
      std::int32_t id = step_->token_ids[static_cast<std::size_t>(t)];
      if (id < 0) id = std::max(reinterpret_cast<const std::int32_t*>(tokens.data())[-1 - id], 0);
      std::memcpy(out.row(t), table.data() + static_cast<std::size_t>(id) * bytes, bytes);
    });
  }

  void rms_norm(Matrix x, const Buffer& weight, double eps, Matrix out) override {
    for_rows(x.rows, x.columns, [&](std::int64_t t) {
      rows::rms_norm(x.row(t), floats(weight), static_cast<float>(eps), out.row(t), dtype_, x.columns);
    });
  }

  void linear(Matrix x, const Linear& weight, Matrix out) override { multiply(x, weight, out, false); }
  void linear_add(Matrix x, const Linear& weight, Matrix inout) override { multiply(x, weight, inout, true); }

  void linear_silu_mul(Matrix x, const Linear& weight, Matrix out) override {
    const std::size_t bytes = static_cast<std::size_t>(2 * out.rows * out.columns * element());
    const Matrix gate_up = dense(grown(gate_up_, bytes), dtype_, out.rows, 2 * out.columns);
    multiply(x, weight, gate_up, false);
    for_rows(out.rows, out.columns, [&](std::int64_t t) {
      const std::byte* gate = gate_up.row(t);
      rows::silu_mul(gate, gate + out.columns * element(), out.row(t), dtype_, out.columns);
    });
  }

  void rope_and_append(Matrix q, Matrix kv, std::int64_t first_token, const Buffer& kv_norm, double eps,
                       const Buffer& cache) override {
    const std::int64_t rank = config_.kv_lora_rank, rope = config_.qk_rope_head_dim, pairs = rope / 2;
    const std::int64_t nope = config_.qk_nope_head_dim;
    for_rows(q.rows, q.columns + kv.columns, [&](std::int64_t t) {
      const std::int64_t token = first_token + t;
      const float* cosines = cosines_.data() + token * pairs;
      const float* sines = sines_.data() + token * pairs;
      const std::int64_t slot = step_->slots[static_cast<std::size_t>(token)];
      std::byte* key = cache.data() + slot * (rank + rope) * element();
      rows::rms_norm(kv.row(t), floats(kv_norm), static_cast<float>(eps), key, dtype_, rank);
      std::memcpy(key + rank * element(), kv.row(t) + rank * element(),
                  static_cast<std::size_t>(rope * element()));
      rows::rotate(key + rank * element(), cosines, sines, dtype_, pairs);
      for (std::int64_t h = 0; h < config_.num_attention_heads; ++h) {
        rows::rotate(q.row(t) + (h * (nope + rope) + nope) * element(), cosines, sines, dtype_, pairs);
      }
    });
  }

  void absorb_queries(Matrix q, const HeadLinear& w_uk, Matrix q_latent) override {
    const auto& weights = static_cast<const CpuHeadLinear&>(w_uk).heads;
    const std::int64_t nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
    const std::int64_t rank = config_.kv_lora_rank;
    for_heads(weights, q.rows, [&](std::int64_t h) {
      const Matrix from = q.column_range(h * (nope + rope), nope + rope);
      const Matrix to = q_latent.column_range(h * (rank + rope), rank + rope);
      gemm_.run(from.column_range(0, nope), weights[static_cast<std::size_t>(h)], nullptr,
                to.column_range(0, rank), {1, step_->batch_invariant, false});
      for (std::int64_t t = 0; t < q.rows; ++t) {
        std::memcpy(to.row(t) + rank * element(), from.row(t) + nope * element(),
                    static_cast<std::size_t>(rope * element()));
      }
    });
  }

  void decode_attention(Matrix q_latent, const Buffer& cache, Matrix out_latent) override {
    const std::int64_t n = step_->num_absorbed, heads = config_.num_attention_heads;
    const std::int64_t rank = config_.kv_lora_rank, width = rank + config_.qk_rope_head_dim;
    const auto pages =
        static_cast<std::int64_t>(cache.bytes()) / (static_cast<std::int64_t>(kPageSize) * width * element());
    DenseDecodeArgs args;
    args.q = TensorView::contiguous(q_latent.data, dtype_, {n, 1, heads, width});
    args.k_cache = TensorView::contiguous(cache.data(), dtype_, {pages, kPageSize, 1, width});
    args.block_table = TensorView::contiguous(const_cast<std::int32_t*>(step_->absorbed_table.data()),
                                              DType::kInt32, {n, step_->max_blocks});
    args.cache_seqlens =
        TensorView::contiguous(const_cast<std::int32_t*>(step_->absorbed_lens.data()), DType::kInt32, {n});
    args.out = TensorView::contiguous(out_latent.data, dtype_, {n, 1, heads, rank});
    DenseDecodeOptions options;
    options.softmax_scale = static_cast<float>(config_.softmax_scale());
    options.num_threads = threads_;
    const DecodeScheduleView schedule = schedule_.view();
    const std::size_t bytes = dense_decode_workspace_size(args, schedule, options);
    dense_decode(args, schedule, grown(decode_workspace_, bytes), bytes, options);
  }

  void expand_values(Matrix out_latent, const HeadLinear& w_uv, Matrix out) override {
    const auto& weights = static_cast<const CpuHeadLinear&>(w_uv).heads;
    const std::int64_t rank = config_.kv_lora_rank, v = config_.v_head_dim;
    for_heads(weights, out_latent.rows, [&](std::int64_t h) {
      gemm_.run(out_latent.column_range(h * rank, rank), weights[static_cast<std::size_t>(h)], nullptr,
                out.column_range(h * v, v), {1, step_->batch_invariant, false});
    });
  }

  void prefill_attention(Matrix q, const Buffer& cache, const Linear& kv_b, Matrix out) override {
    const PackedWeight& weight = static_cast<const CpuLinear&>(kv_b).weight;
    // Many chunks: one for each thread at a time. Few: each is shared.
    const auto chunks = std::ssize(step_->chunks);
    const bool whole = chunks / 2 >= threads_;
    parallel_for(chunks, whole ? threads_ : 1, [&](std::int64_t i) {
      const Chunk& chunk = step_->chunks[static_cast<std::size_t>(i)];
      const std::int64_t first = chunk.first_token - step_->num_absorbed;
      model::prefill_attention(config_, gemm_, whole ? 1 : threads_, step_->batch_invariant, chunk,
                               q.row_range(first, chunk.num_tokens), cache, weight,
                               out.row_range(first, chunk.num_tokens));
    });
  }

  void route(Matrix x, const Linear& router, const Buffer& bias, const Buffer& ids,
             const Buffer& weights) override {
    const std::int64_t experts = config_.n_routed_experts, chosen = config_.num_experts_per_tok;
    // Blocks of whole tiles, so that a row's tile does not depend on how many threads there are.
    const std::int64_t blocks = (x.rows + kBlockRows - 1) / kBlockRows;
    parallel_for(blocks, x.rows * x.columns >= kParallelElements ? threads_ : 1, [&](std::int64_t block) {
      thread_local Buffer wide, logits_buffer;
      const std::int64_t first = block * kBlockRows, count = std::min(kBlockRows, x.rows - first);
      const Matrix input = buffered(wide, DType::kFloat32, count, x.columns);
      const Matrix logits = buffered(logits_buffer, DType::kFloat32, count, experts);
      for (std::int64_t i = 0; i < count; ++i) {
        rows::widen(x.row(first + i), dtype_, reinterpret_cast<float*>(input.row(i)), x.columns);
      }
      gemm_.run(input, static_cast<const CpuLinear&>(router).weight, nullptr, logits,
                {1, step_->batch_invariant, false});
      const Routing routing = config_.routing();
      for (std::int64_t i = 0; i < count; ++i) {
        cpu::choose_experts(routing, reinterpret_cast<const float*>(logits.row(i)),
                            bias.bytes() > 0 ? floats(bias) : nullptr,
                            reinterpret_cast<std::int32_t*>(ids.data()) + (first + i) * chosen,
                            reinterpret_cast<float*>(weights.data()) + (first + i) * chosen);
      }
    });
  }

  // Every expert multiplies the rows of its tokens; the results of a token's experts are then added in the
  // order of its choice, whichever expert was done first.
  void experts_add(Matrix x, const Experts& all, const Buffer& ids, const Buffer& weights,
                   Matrix inout) override {
    const auto& experts = static_cast<const CpuExperts&>(all).experts;
    const std::int64_t chosen = config_.num_experts_per_tok, hidden = x.columns;
    const auto* weight = reinterpret_cast<const float*>(weights.data());
    sort_by_expert(
        {reinterpret_cast<const std::int32_t*>(ids.data()), static_cast<std::size_t>(x.rows * chosen)},
        experts.size());
    const Matrix results = buffered(expert_out_, DType::kFloat32, x.rows * chosen, hidden);
    const std::int64_t expert_weights = 3 * hidden * experts[0].down.in_features();
    // Rows and weights of the average piece, for all of them.
    const auto count = std::ssize(pieces_);
    const bool threads =
        worth_threads(count * expert_weights, x.rows * chosen / std::max<std::int64_t>(count, 1));
    parallel_for(count, threads ? threads_ : 1, [&](std::int64_t i) {
      const Piece& piece = pieces_[static_cast<std::size_t>(i)];
      run_expert(x, experts[piece.expert], piece, results.row_range(piece.first, piece.count));
    });
    for_rows(x.rows, hidden * chosen, [&](std::int64_t t) {
      thread_local std::vector<float> sum;
      sum.resize(static_cast<std::size_t>(hidden));
      rows::widen(inout.row(t), dtype_, sum.data(), hidden);
      for (std::int64_t i = t * chosen; i < (t + 1) * chosen; ++i) {
        const std::int64_t row = places_[static_cast<std::size_t>(i)];
        rows::add_scaled(reinterpret_cast<const float*>(results.row(row)), weight[i], sum.data(), hidden);
      }
      rows::narrow(sum.data(), inout.row(t), dtype_, hidden);
    });
  }

  void gather_logit_rows(Matrix x, Matrix out) override {
    for (std::int64_t i = 0; i < out.rows; ++i) {
      std::memcpy(out.row(i), x.row(step_->logit_rows[static_cast<std::size_t>(i)]),
                  static_cast<std::size_t>(x.columns * element()));
    }
  }

  void copy(const Buffer& buffer, std::size_t source, std::size_t target, std::size_t bytes) override {
    std::memmove(buffer.data() + target, buffer.data() + source, bytes);
  }

  void choose(Matrix logits, const Buffer& tokens) override {
    const std::int64_t first = step_->first_chosen;
    for_rows(logits.rows - first, logits.columns, [&](std::int64_t i) {
      const auto* row = reinterpret_cast<const float*>(logits.row(first + i));
      std::int32_t& token = reinterpret_cast<std::int32_t*>(tokens.data())[first + i];
      token = model::likeliest(row, logits.columns);
      const Draw draw = step_->draws.empty() ? Draw() : step_->draws[static_cast<std::size_t>(first + i)];
      if (token < 0 || draw.scale == 0) return;
      thread_local cpu::DrawScratch scratch;
      token = cpu::draw_token({row, static_cast<std::size_t>(logits.columns)}, row[token], draw, scratch);
    });
  }

  void download(const std::byte* data, std::size_t bytes, void* host) override {
    std::memcpy(host, data, bytes);
  }

  std::unique_ptr<Download> start_download(const std::byte* data, std::size_t bytes) override {
    struct Copy : Download {
      std::vector<std::byte> copy;
      const std::byte* wait() override { return copy.data(); }
    };
    auto out = std::make_unique<Copy>();
    out->copy.assign(data, data + bytes);
    return out;
  }

 private:
  PackedWeight pack(const float* weight, std::int64_t out_features, std::int64_t in_features) const {
    return quantize_ == ModelQuantize::kInt8 ? gemm_.pack_int8(weight, out_features, in_features, dtype_)
                                             : gemm_.pack(weight, out_features, in_features, dtype_);
  }

  std::int64_t element() const { return static_cast<std::int64_t>(dtype_size(dtype_)); }

  static std::byte* grown(Buffer& buffer, std::size_t bytes) {
    if (bytes > buffer.bytes()) buffer = allocate_aligned(bytes);
    return buffer.data();
  }

  // In a buffer that grows and stays.
  static Matrix buffered(Buffer& buffer, DType dtype, std::int64_t rows, std::int64_t columns) {
    return dense(grown(buffer, static_cast<std::size_t>(rows * columns) * dtype_size(dtype)), dtype, rows,
                 columns);
  }

  template <class F>
  void for_rows(std::int64_t rows, std::int64_t columns, F&& f) const {
    parallel_for(rows, rows * columns >= kParallelElements ? threads_ : 1, f);
  }

  template <class F>
  void for_heads(const std::vector<PackedWeight>& heads, std::int64_t rows, F&& f) const {
    const std::int64_t weights = std::ssize(heads) * heads[0].out_features() * heads[0].in_features();
    parallel_for(std::ssize(heads), worth_threads(weights, rows) ? threads_ : 1, f);
  }

  void multiply(Matrix x, const Linear& weight, Matrix out, bool accumulate) {
    const auto& linear = static_cast<const CpuLinear&>(weight);
    gemm_.run(x, linear.weight, linear.bias.empty() ? nullptr : linear.bias.data(), out,
              {threads_, step_->batch_invariant, accumulate});
  }

  // Lists the choices (token * num_experts_per_tok + rank) expert by expert in `by_expert_`, and cuts each
  // expert's into pieces.
  void sort_by_expert(std::span<const std::int32_t> ids, std::size_t num_experts) {
    expert_ends_.assign(num_experts, 0);
    for (const std::int32_t e : ids) ++expert_ends_[static_cast<std::size_t>(e)];
    pieces_.clear();
    std::int64_t first = 0;
    for (std::size_t e = 0; e < num_experts; ++e) {
      const std::int64_t end = first + std::exchange(expert_ends_[e], first);
      for (; first < end; first += kPieceRows) {
        pieces_.push_back({e, first, std::min(kPieceRows, end - first)});
      }
      first = end;
    }
    by_expert_.resize(ids.size());
    places_.resize(ids.size());
    for (std::size_t i = 0; i < ids.size(); ++i) {
      places_[i] = expert_ends_[static_cast<std::size_t>(ids[i])]++;
      by_expert_[static_cast<std::size_t>(places_[i])] = static_cast<std::int64_t>(i);
    }
    // The longest first, so that no thread is left with one at the end.
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const Piece& a, const Piece& b) { return a.count > b.count; });
  }

  // Multiplies the rows of a piece's choices, in their order.
  void run_expert(const Matrix& x, const CpuExperts::Expert& expert, const Piece& piece, const Matrix& out) {
    const std::int64_t hidden = x.columns, intermediate = expert.down.in_features();
    thread_local Buffer in_buffer, gate_up_buffer, act_buffer;
    const Matrix in = buffered(in_buffer, dtype_, piece.count, hidden),
                 gate_up = buffered(gate_up_buffer, dtype_, piece.count, 2 * intermediate),
                 act = buffered(act_buffer, dtype_, piece.count, intermediate);
    for (std::int64_t i = 0; i < piece.count; ++i) {
      const std::int64_t choice = by_expert_[static_cast<std::size_t>(piece.first + i)];
      std::memcpy(in.row(i), x.row(choice / config_.num_experts_per_tok),
                  static_cast<std::size_t>(hidden * element()));
    }
    const GemmMode mode{1, step_->batch_invariant, false};
    gemm_.run(in, expert.gate_up, nullptr, gate_up, mode);
    for (std::int64_t i = 0; i < piece.count; ++i) {
      rows::silu_mul(gate_up.row(i), gate_up.row(i) + intermediate * element(), act.row(i), dtype_,
                     intermediate);
    }
    gemm_.run(act, expert.down, nullptr, out, mode);
  }

  ModelConfig config_;
  Rope rope_;
  DType dtype_;
  ModelQuantize quantize_;
  int threads_;
  Gemm gemm_;

  const Step* step_ = nullptr;
  std::vector<float> cosines_, sines_;  // (tokens, qk_rope_head_dim / 2)
  DecodeSchedule schedule_;
  Buffer decode_workspace_, gate_up_, expert_out_;
  std::vector<std::int64_t> expert_ends_, by_expert_, places_;  // places_: the inverse of by_expert_
  std::vector<Piece> pieces_;
};

}  // namespace

DType preferred_cpu_dtype() { return Gemm::native_bfloat16() ? DType::kBFloat16 : DType::kFloat32; }

std::unique_ptr<Ops> make_cpu_ops(const ModelConfig& config, DType dtype, ModelQuantize quantize,
                                  int num_threads) {
  if (dtype == DType::kBFloat16 && !Gemm::supports_bfloat16()) {
    throw Unsupported("precision bfloat16 needs a processor with AVX-512; use float32");
  }
  return std::make_unique<CpuOps>(config, dtype, quantize, num_threads > 0 ? num_threads : default_threads());
}

}  // namespace flash_mla::model
