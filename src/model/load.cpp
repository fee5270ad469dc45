#include <fmt/format.h>

#include <optional>
#include <string>
#include <utility>

#include "base/host_memory.h"
#include "flash_mla/error.h"
#include "model/deepseek.h"
#include "model/device/cpu/cpu_device.h"
#include "model/device/cuda/cuda_device.h"
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

const char* name_of(ModelQuantize quantize) {
  switch (quantize) {
    case ModelQuantize::kNone:
      return "none";
    case ModelQuantize::kInt8:
      return "int8";
    case ModelQuantize::kFp8:
      return "fp8";
    case ModelQuantize::kW4A8:
      return "w4a8";
  }
  return "unknown";
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
  return why_no_cuda_indexer(config).empty() && options.kv_cache != ModelKvCache::kFloat16 &&
         (options.kv_cache != ModelKvCache::kFp8 || config.index_topk > 0) &&
         options.precision != ModelPrecision::kFloat32 &&
         (options.quantize == ModelQuantize::kNone || options.quantize == ModelQuantize::kFp8) &&
         why_no_cuda_device().empty();
}

std::unique_ptr<Device> make_device(const ModelConfig& config, const ModelOptions& options) {
  if (!takes_cuda(config, options)) {
    const DType dtype = cpu_dtype(options.precision);
    const std::optional<KvFormat> cache_format = cpu_cache_format(config, dtype, options.kv_cache);
    check_fits(config, dtype, options.quantize, static_cast<double>(host_memory()));
    return make_cpu_device(config, dtype, cache_format, options);
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
  if (options.quantize != ModelQuantize::kNone && options.quantize != ModelQuantize::kFp8) {
    throw Unsupported(
        fmt::format("quantize is {}: device cuda keeps weights in bfloat16 or fp8 so far; use device cpu",
                    name_of(options.quantize)));
  }
  // Before anything is loaded; make_cuda_device says what is missing where there is no GPU.
  if (why_no_cuda_device().empty()) {
    check_fits_device(config, options.cache_pages, static_cast<double>(options.cache_bytes), fp8_cache,
                      cuda_memory(), options.quantize);
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

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelOptions& options,
                                  std::unique_ptr<Device> device, std::unique_ptr<WeightSource> source) {
  const double all = num_weights(config);
  const double bytes = takes_cuda(config, options)
                           ? device_weight_bytes(config, options.quantize)
                           : weight_bytes(config, cpu_dtype(options.precision), options.quantize);
  WatchedWeights weights(config, std::move(source), bytes / all, options.on_load);
  auto model = std::make_unique<DeepSeek>(config, std::move(device), weights, options.draft_module);
  weights.report_end();
  return model;
}

void check(const ModelOptions& options) {
  if (options.num_threads < 0) {
    throw InvalidArgument(fmt::format("num_threads is {}, expected >= 0", options.num_threads));
  }
}

}  // namespace

std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options) {
  check(options);
  const ModelConfig config = checkpoint::read_config(directory);
  const Checkpoint checkpoint = Checkpoint::open(directory);
  std::unique_ptr<Device> device = make_device(config, options);
  auto weights = checkpoint_weights(config, checkpoint, device->weight_dtype());
  return make_model(config, options, std::move(device), std::move(weights));
}

std::unique_ptr<Model> make_random_model(const ModelConfig& config, const ModelOptions& options) {
  check(options);
  std::unique_ptr<Device> device = make_device(config, options);
  auto weights =
      random_weights(config, device->makes_up_weights(), options.draft_module && config.shares_index.empty());
  return make_model(config, options, std::move(device), std::move(weights));
}

}  // namespace flash_mla::model
