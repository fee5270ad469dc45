#include <fmt/format.h>

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
  return config.index_topk == 0 && options.precision != ModelPrecision::kFloat32 &&
         options.quantize == ModelQuantize::kNone && why_no_cuda_device().empty();
}

std::unique_ptr<Device> make_device(const ModelConfig& config, const ModelOptions& options) {
  if (!takes_cuda(config, options)) {
    const DType dtype = cpu_dtype(options.precision);
    check_fits(config, dtype, options.quantize, static_cast<double>(host_memory()));
    return make_cpu_device(config, dtype, options.quantize, options.num_threads);
  }
  if (config.index_topk > 0) {
    throw Unsupported(fmt::format(
        "model_type is {}: device cuda has no sparse attention with an indexer yet; use device cpu",
        config.model_type));
  }
  if (options.precision == ModelPrecision::kFloat32) {
    throw Unsupported("device cuda runs models in bfloat16; precision float32 needs device cpu");
  }
  if (options.quantize != ModelQuantize::kNone) {
    throw Unsupported("quantize: device cuda runs models in bfloat16; int8 needs device cpu");
  }
  return make_cuda_device(config, options.time_steps);
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
  const auto weights = checkpoint_weights(config, checkpoint, device->weight_dtype());
  return std::make_unique<DeepSeek>(config, std::move(device), *weights);
}

std::unique_ptr<Model> make_random_model(const ModelConfig& config, const ModelOptions& options) {
  check(options);
  std::unique_ptr<Device> device = make_device(config, options);
  const auto weights = random_weights(config, device->makes_up_weights());
  return std::make_unique<DeepSeek>(config, std::move(device), *weights);
}

}  // namespace flash_mla::model
