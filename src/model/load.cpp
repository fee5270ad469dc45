#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/host_memory.h"
#include "base/parallel.h"
#include "flash_mla/error.h"
#include "model/deepseek.h"
#include "model/device/cpu/cpu_device.h"
#include "model/device/cuda/cuda_device.h"
#include "model/parallel/parallel_model.h"
#include "model/parallel/partition.h"
#include "model/size.h"
#include "model/weights.h"

namespace flash_mla::model {
namespace {

DType cpu_dtype(ModelPrecision precision) {
  switch (precision) {
    case ModelPrecision::kFloat32:
      return DType::kFloat32;
    case ModelPrecision::kBFloat16:
      return DType::kBFloat16;
    case ModelPrecision::kAuto:
      break;
  }
  return preferred_cpu_dtype();
}

// A GPU where there is one that can run the model and nothing asks for what it cannot do.
bool takes_cuda(const ModelConfig& config, const ModelOptions& options) {
  switch (options.device) {
    case ModelDevice::kCpu:
      return false;
    case ModelDevice::kCuda:
      return true;
    case ModelDevice::kAuto:
      break;
  }
  return options.tp == 1 && why_no_cuda_indexer(config).empty() &&
         options.kv_cache != ModelKvCache::kFloat16 &&
         (options.kv_cache != ModelKvCache::kFp8 || config.index_topk > 0) &&
         options.precision != ModelPrecision::kFloat32 && options.quantize != ModelQuantize::kInt8 &&
         why_no_cuda_device().empty();
}

/// One of the ranks that share a model.
struct Seat {
  Partition partition;
  comm::Communicator* communicator = nullptr;  ///< null: the rank is alone
  bool module = false;                         ///< it has one for multi-token prediction
};

std::unique_ptr<Device> make_device(const ModelConfig& config, const ModelOptions& options,
                                    const Seat& seat) {
  if (!takes_cuda(config, options)) {
    const DType dtype = cpu_dtype(options.precision);
    const std::optional<KvFormat> cache_format = cpu_cache_format(config, dtype, options.kv_cache);
    check_fits(config, dtype, options.quantize, static_cast<double>(host_memory()));
    return make_cpu_device(seat.partition.local(config), dtype, cache_format, options, seat.partition,
                           seat.communicator);
  }
  if (options.tp > 1) {
    throw Unsupported(
        fmt::format("tp is {}: device cuda runs a model on one rank so far; use device cpu", options.tp));
  }
  if (const std::string why = why_no_cuda_indexer(config); !why.empty()) throw Unsupported(why);
  const bool fp8_cache = options.kv_cache == ModelKvCache::kFp8;
  if (options.kv_cache == ModelKvCache::kFloat16 || (fp8_cache && config.index_topk == 0)) {
    throw Unsupported(
        fmt::format("kv_cache: device cuda keeps the cache of this model in bfloat16; {} needs device cpu",
                    fp8_cache ? "fp8" : "float16"));
  }
  if (options.precision == ModelPrecision::kFloat32) {
    throw Unsupported("device cuda runs models in bfloat16; precision float32 needs device cpu");
  }
  if (options.quantize == ModelQuantize::kInt8) {
    throw Unsupported("quantize is int8: device cuda keeps weights in bfloat16, fp8 or w4a8; use device cpu");
  }
  // Before anything is loaded; make_cuda_device says what is missing where there is no GPU.
  if (why_no_cuda_device().empty()) {
    check_fits_device(config, options.cache_pages, static_cast<double>(options.cache_bytes), fp8_cache,
                      cuda_memory(), options.quantize, seat.module);
  }
  return make_cuda_device(config, options.quantize, options.time_steps, fp8_cache);
}

/// Weights whose reader is told of: a model asks for those of a layer once it has made the layers before.
class WatchedWeights : public WeightSource {
 public:
  WatchedWeights(const ModelConfig& config, std::unique_ptr<WeightSource> source, double weight_bytes,
                 const std::function<void(const LoadProgress&)>& on_load)
      : config_(config), source_(std::move(source)), weight_bytes_(weight_bytes), on_load_(on_load) {}

  Weight embedding() override { return source_->embedding(); }
  AttentionWeights attention(int layer) override {
    if (layer < config_.num_hidden_layers) report(layer, num_weights_before(config_, layer));
    return source_->attention(layer);
  }
  FeedForwardWeights feed_forward(int layer) override { return source_->feed_forward(layer); }
  MixtureWeights mixture(int layer) override { return source_->mixture(layer); }
  HeadWeights head() override { return source_->head(); }
  bool has_mtp() const override { return source_->has_mtp(); }
  MtpWeights mtp() override { return source_->mtp(); }

  void report_end() const { report(config_.num_hidden_layers, num_weights(config_)); }

 private:
  void report(int layers, double weights) const {
    if (!on_load_) return;
    on_load_(
        {layers, config_.num_hidden_layers, weights * weight_bytes_, num_weights(config_) * weight_bytes_});
  }

  const ModelConfig& config_;
  std::unique_ptr<WeightSource> source_;
  double weight_bytes_;
  const std::function<void(const LoadProgress&)>& on_load_;
};

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelOptions& options, const Seat& seat,
                                  std::unique_ptr<Device> device, std::unique_ptr<WeightSource> source) {
  const double all = num_weights(config);
  const double bytes = takes_cuda(config, options)
                           ? device_weight_bytes(config, options.quantize)
                           : weight_bytes(config, cpu_dtype(options.precision), options.quantize);
  WatchedWeights weights(config, std::move(source), bytes / all, options.on_load);
  auto model = std::make_unique<DeepSeek>(seat.partition.local(config), std::move(device), weights,
                                          options.draft_module);
  weights.report_end();
  return model;
}

void check(const ModelConfig& config, const ModelOptions& o) {
  const auto fail = [](const char* name, std::int64_t value, const std::string& expected) {
    throw InvalidArgument(fmt::format("{} is {}, expected {}", name, value, expected));
  };
  if (o.num_threads < 0) fail("num_threads", o.num_threads, ">= 0");
  if (o.tp < 1 || config.num_attention_heads % o.tp != 0) {
    fail("tp", o.tp, fmt::format("a divisor of {}, the attention heads", config.num_attention_heads));
  }
  if (o.ep < 0 || (o.ep > 0 && o.tp % o.ep != 0)) {
    fail("ep", o.ep, fmt::format("0 or a divisor of tp, {}", o.tp));
  }
  if (o.tp == 1) return;
  if (o.on_product) throw Unsupported(fmt::format("on_product with tp {}: expected tp 1", o.tp));
  for (const auto& [name, size] :
       {std::pair("hidden_size", config.hidden_size), std::pair("vocab_size", config.vocab_size),
        std::pair("intermediate_size", config.intermediate_size),
        std::pair("moe_intermediate_size", config.moe_intermediate_size)}) {
    if (size > 0 && size < o.tp) fail("tp", o.tp, fmt::format("at most {}, {}", size, name));
  }
}

/// A model on as many ranks as the options ask for. `module`: with one for multi-token prediction. `weights(device,
/// partition)`: the source of a rank's.
template <class Weights>
std::unique_ptr<Model> make_ranks(const ModelConfig& config, const ModelOptions& options, bool module,
                                  const Weights& weights) {
  if (options.tp == 1) {
    const Seat seat{{}, nullptr, module};
    std::unique_ptr<Device> device = make_device(config, options, seat);
    auto source = weights(*device, seat.partition);
    return make_model(config, options, seat, std::move(device), std::move(source));
  }
  const auto experts = std::make_shared<const ExpertPlacement>(
      config, options.tp, options.ep > 0 ? options.ep : options.tp, options.expert_placement);
  const int threads = options.num_threads > 0 ? options.num_threads : default_threads();
  return std::make_unique<ParallelModel>(options.tp, [&](int rank, comm::Communicator& communicator) {
    ModelOptions own = options;
    own.num_threads = std::max(threads / options.tp, 1);
    if (rank > 0) own.on_load = nullptr;
    const Seat seat{{rank, options.tp, options.batch_invariant, experts}, &communicator, module};
    std::unique_ptr<Device> device = make_device(config, own, seat);
    auto source = weights(*device, seat.partition);
    return make_model(config, own, seat, std::move(device), std::move(source));
  });
}

}  // namespace

std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options) {
  const ModelConfig config = checkpoint::read_config(directory);
  check(config, options);
  const Checkpoint checkpoint = Checkpoint::open(directory);
  const bool module = options.draft_module && has_module(config, checkpoint);
  return make_ranks(config, options, module, [&](const Device& device, const Partition& partition) {
    return checkpoint_weights(config, checkpoint, device.weight_dtype(), partition);
  });
}

std::unique_ptr<Model> make_random_model(const ModelConfig& config, const ModelOptions& options) {
  check(config, options);
  const bool module = options.draft_module && config.shares_index.empty();
  return make_ranks(config, options, module, [&](const Device& device, const Partition& partition) {
    return random_weights(config, device.makes_up_weights(), module, partition);
  });
}

}  // namespace flash_mla::model
