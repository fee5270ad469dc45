#include "model/device/cpu/cpu_device.h"

#include <fmt/format.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "base/aligned.h"
#include "base/parallel.h"
#include "flash_mla/error.h"
#include "kernels/gemm/cpu/gemm.h"
#include "model/device/cpu/attention.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/embedding.h"
#include "model/device/cpu/feed_forward.h"
#include "model/device/cpu/head.h"
#include "model/device/cpu/mixture_of_experts.h"
#include "model/device/cpu/mtp_input.h"

namespace flash_mla::model {
namespace {

/// Steps have run when they have been queued, and so have copies.
class AtOnce : public CopyQueue {
 public:
  void wait_for_steps() override {}
  void copy(std::byte* to, const std::byte* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  std::unique_ptr<CopyMark> mark() override {
    struct Done : CopyMark {
      bool done() override { return true; }
      void wait() override {}
    };
    return std::make_unique<Done>();
  }
};

class CpuDevice : public Device {
 public:
  CpuDevice(const ModelConfig& config, DType dtype, std::optional<KvFormat> cache_format,
            const ModelOptions& options, const Partition& partition, const RankLinks& links)
      : context_(config, dtype, cache_format, options, partition, links) {}

  std::size_t free_memory() const override { return 0; }
  ScheduleOptions schedule_options(int /*sequences*/, bool batch_invariant) const override {
    return context_.schedule_options(batch_invariant);
  }
  bool queues() const override { return false; }
  bool runs_empty_steps() const override { return context_.partition.own_tokens; }
  double device_seconds() const override { return 0; }

  DType weight_dtype() const override { return DType::kFloat32; }
  bool makes_up_weights() const override { return false; }
  std::unique_ptr<Embedding> make_embedding(const Weight& table) override {
    return std::make_unique<CpuEmbedding>(context_, table);
  }
  std::unique_ptr<Attention> make_attention(const AttentionWeights& weights) override {
    return std::make_unique<CpuAttention>(context_, weights);
  }
  std::unique_ptr<FeedForward> make_feed_forward(const FeedForwardWeights& weights) override {
    return std::make_unique<CpuFeedForward>(context_, weights);
  }
  std::unique_ptr<FeedForward> make_mixture_of_experts(const MixtureWeights& weights) override {
    return std::make_unique<CpuMixtureOfExperts>(context_, weights);
  }
  std::unique_ptr<Head> make_head(const HeadWeights& weights) override {
    return std::make_unique<CpuHead>(context_, weights);
  }
  std::unique_ptr<MtpInput> make_mtp_input(const MtpWeights& weights) override {
    return std::make_unique<CpuMtpInput>(context_, weights);
  }
  std::unique_ptr<Head> make_mtp_head(const Head& head, const MtpWeights& weights) override {
    return std::make_unique<CpuHead>(static_cast<const CpuHead&>(head), weights.head_norm);
  }

  void reserve(std::int64_t num_tokens, std::int64_t num_rows) override {
    context_.reserve(num_tokens, num_rows);
  }
  void begin_step(Step& step) override { context_.begin_step(step); }
  void run(const std::function<void()>& pass) override { pass(); }
  void choose(const Matrix& logits) override { choose(logits, {}); }
  bool chooses_among() const override { return true; }
  void choose_among(std::int64_t /*first*/, std::span<const TokenRule> rules) override {
    const auto rows = static_cast<std::int64_t>(context_.step->logit_rows.size());
    choose(CpuContext::matrix(context_.buffers.logits, DType::kFloat32, rows, context_.config.vocab_size),
           rules);
  }

  void download_logits(std::int64_t rows, float* logits) override {
    std::memcpy(logits, context_.buffers.logits.data(),
                static_cast<std::size_t>(rows * context_.config.vocab_size) * sizeof(float));
  }
  std::unique_ptr<Download> start_token_download(std::int64_t first, std::int64_t count) override {
    struct Copy : Download {
      std::vector<std::byte> copy;
      const std::byte* wait() override { return copy.data(); }
    };
    constexpr std::int64_t kId = sizeof(std::int32_t);
    auto out = std::make_unique<Copy>();
    const std::byte* tokens = context_.buffers.tokens.data();
    out->copy.assign(tokens + first * kId, tokens + (first + count) * kId);
    return out;
  }

  std::unique_ptr<CopyQueue> make_copy_queue() override { return std::make_unique<AtOnce>(); }
  Buffer allocate_host(std::size_t bytes) override { return allocate_aligned(bytes); }

 private:
  void choose(const Matrix& logits, std::span<const TokenRule> rules) {
    if (logits.rows == 0) return;
    const Matrix tokens = CpuContext::matrix(context_.buffers.tokens, DType::kInt32, logits.rows, 1);
    choose_tokens(context_, logits, reinterpret_cast<std::int32_t*>(tokens.data), rules);
  }

  CpuContext context_;
};

}  // namespace

DType preferred_cpu_dtype() { return cpu::Gemm::native_bfloat16() ? DType::kBFloat16 : DType::kFloat32; }

std::optional<KvFormat> cpu_cache_format(const ModelConfig& config, DType dtype, ModelKvCache kv_cache) {
  if (kv_cache == ModelKvCache::kAuto) return std::nullopt;
  if (kv_cache == ModelKvCache::kBFloat16 && dtype == DType::kBFloat16) return std::nullopt;
  if (kv_cache == ModelKvCache::kFloat16 && dtype != DType::kFloat32) {
    throw Unsupported(
        fmt::format("kv_cache is float16 and the model's precision {}, expected float32", dtype_name(dtype)));
  }
  const bool fp8 = kv_cache == ModelKvCache::kFp8;
  for (const auto& [name, value, expected] : {std::tuple("kv_lora_rank", config.kv_lora_rank, 512),
                                              std::tuple("qk_rope_head_dim", config.qk_rope_head_dim, 64)}) {
    if (value == expected) continue;
    throw Unsupported(fmt::format("{} is {}, expected {} for a kv_cache of {}", name, value, expected,
                                  fp8 ? "fp8"
                                  : kv_cache == ModelKvCache::kFloat16
                                      ? "float16"
                                      : "bfloat16 beside precision float32"));
  }
  if (!fp8) return kv_cache == ModelKvCache::kFloat16 ? KvFormat::kFloat16 : KvFormat::kBFloat16;
  if (config.index_topk > 0 && config.index_head_dim != 64 && config.index_head_dim != 128) {
    throw Unsupported(
        fmt::format("index_head_dim is {}, expected 64 or 128 for a kv_cache of fp8", config.index_head_dim));
  }
  return KvFormat::kFp8V32;
}

std::unique_ptr<Device> make_cpu_device(const ModelConfig& config, DType dtype,
                                        std::optional<KvFormat> cache_format, const ModelOptions& options,
                                        const Partition& partition, const RankLinks& links) {
  if (dtype == DType::kBFloat16 && !cpu::Gemm::supports_bfloat16()) {
    throw Unsupported("precision bfloat16 needs a processor with AVX-512; use float32");
  }
  return std::make_unique<CpuDevice>(config, dtype, cache_format, options, partition, links);
}

}  // namespace flash_mla::model
