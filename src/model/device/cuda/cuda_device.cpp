#include "model/device/cuda/cuda_device.h"

#include <fmt/format.h>

#include <exception>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "flash_mla/info.h"
#include "flash_mla/schedule.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/gemm/sm90/cublaslt.h"
#include "model/device/cuda/attention.h"
#include "model/device/cuda/context.h"
#include "model/device/cuda/copy_queue.h"
#include "model/device/cuda/embedding.h"
#include "model/device/cuda/feed_forward.h"
#include "model/device/cuda/graph_cache.h"
#include "model/device/cuda/head.h"
#include "model/device/cuda/memory.h"
#include "model/device/cuda/mixture_of_experts.h"
#include "model/device/cuda/mtp_input.h"
#include "model/device/cuda/step_timer.h"

namespace flash_mla::model {
namespace {

class CudaDevice : public Device {
 public:
  CudaDevice(const ModelConfig& config, ModelQuantize quantize, bool time_steps, bool fp8_cache)
      : context_(config, quantize, fp8_cache), timer_(time_steps ? std::make_unique<StepTimer>() : nullptr) {}
  ~CudaDevice() override { cudaStreamSynchronize(context_.stream); }

  std::size_t free_memory() const override { return context_.pool->free_memory(); }
  ScheduleOptions schedule_options(int sequences, bool batch_invariant) const override {
    return context_.schedule_options(sequences, batch_invariant);
  }
  bool queues() const override { return true; }
  double device_seconds() const override { return timer_ ? timer_->seconds() : 0; }

  DType weight_dtype() const override { return DType::kBFloat16; }
  bool makes_up_weights() const override { return true; }
  std::unique_ptr<Embedding> make_embedding(const Weight& table) override {
    return std::make_unique<CudaEmbedding>(context_, table);
  }
  std::unique_ptr<Attention> make_attention(const AttentionWeights& weights) override {
    return std::make_unique<CudaAttention>(context_, weights);
  }
  std::unique_ptr<FeedForward> make_feed_forward(const FeedForwardWeights& weights) override {
    return std::make_unique<CudaFeedForward>(context_, weights);
  }
  std::unique_ptr<FeedForward> make_mixture_of_experts(const MixtureWeights& weights) override {
    return std::make_unique<CudaMixtureOfExperts>(context_, weights);
  }
  std::unique_ptr<Head> make_head(const HeadWeights& weights) override {
    return std::make_unique<CudaHead>(context_, weights);
  }
  std::unique_ptr<MtpInput> make_mtp_input(const MtpWeights& weights) override {
    return std::make_unique<CudaMtpInput>(context_, weights);
  }
  std::unique_ptr<Head> make_mtp_head(const Head& head, const MtpWeights& weights) override {
    return std::make_unique<CudaHead>(static_cast<const CudaHead&>(head), weights.head_norm);
  }

  void reserve(std::int64_t num_tokens, std::int64_t num_rows) override {
    context_.reserve(num_tokens, num_rows);
  }
  void begin_step(Step& step) override { context_.begin_step(step); }

  void run(const std::function<void()>& pass) override {
    if (timer_) timer_->begin(context_.stream);
    const auto planned_pass = [&] {
      context_.begin_pass();
      pass();
    };
    const Step& step = *context_.step;
    if (context_.recorded) {
      graphs_.run({step.num_tokens(), context_.data.max_blocks, step.batch_invariant, !step.draws.empty(),
                   step.masked, context_.selects(), step.reads, context_.is_one_token_step(),
                   context_.tokens_per_request()},
                  *context_.pool, context_.stream, planned_pass);
    } else {
      planned_pass();
    }
    if (timer_) timer_->end(context_.stream);
  }

  void choose(const Matrix& logits) override { choose_tokens(context_, logits); }
  bool chooses_among() const override { return true; }
  void choose_among(std::int64_t first, std::span<const TokenRule> rules) override {
    choose_tokens_among(context_, first, rules);
  }

  void download_logits(std::int64_t rows, float* logits) override {
    const std::size_t bytes = static_cast<std::size_t>(rows * context_.config.vocab_size) * sizeof(float);
    context_.download(context_.buffers.logits.data(), bytes, logits);
  }
  std::unique_ptr<Download> start_token_download(std::int64_t first, std::int64_t count) override {
    constexpr auto kId = static_cast<std::int64_t>(sizeof(std::int32_t));
    return downloader_.start(context_.buffers.tokens.data() + first * kId,
                             static_cast<std::size_t>(count * kId), context_.stream);
  }

  std::unique_ptr<CopyQueue> make_copy_queue() override {
    return std::make_unique<CudaCopyQueue>(context_.stream);
  }
  Buffer allocate_host(std::size_t bytes) override { return allocate_pinned(bytes); }

 private:
  CudaContext context_;
  std::unique_ptr<StepTimer> timer_;  // or null
  Downloader downloader_;
  GraphCache graphs_;
};

}  // namespace

std::string why_no_cuda_device() {
  if (sm90::gpus().empty()) return fmt::format("this machine has {}; use cpu", sm90::why_no_gpus());
  try {
    cuda_schedule_options(0, 1, 1, 1);
  } catch (const std::exception& e) {
    return e.what();
  }
  return sm90::why_no_cublaslt();
}

DeviceMemory cuda_memory() {
  if (const std::string why = why_no_cuda_device(); !why.empty()) throw Unsupported("device cuda: " + why);
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return {static_cast<double>(free), static_cast<double>(total)};
}

std::unique_ptr<Device> make_cuda_device(const ModelConfig& config, ModelQuantize quantize, bool time_steps,
                                         bool fp8_cache) {
  if (const std::string why = why_no_cuda_device(); !why.empty()) throw Unsupported("device cuda: " + why);
  return std::make_unique<CudaDevice>(config, quantize, time_steps, fp8_cache);
}

}  // namespace flash_mla::model
