#include <fmt/format.h>

#include "flash_mla/error.h"
#include "model/cpu_ops.h"
#include "model/deepseek.h"

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

}  // namespace

std::unique_ptr<Model> load_model(const std::filesystem::path& directory, const ModelOptions& options) {
  if (options.num_threads < 0) {
    throw InvalidArgument(fmt::format("num_threads is {}, expected >= 0", options.num_threads));
  }
  if (options.device == ModelDevice::kCuda) {
    throw Unsupported("device cuda: this build runs models on the CPU only; use cpu");
  }
  const ModelConfig config = read_config(directory);
  const Checkpoint checkpoint = Checkpoint::open(directory);
  return std::make_unique<DeepSeek>(
      config, checkpoint,
      make_cpu_ops(config, cpu_dtype(options.precision), options.quantize, options.num_threads));
}

}  // namespace flash_mla::model
