#include <fmt/format.h>

#include <utility>

#include "flash_mla/error.h"
#include "model/cpu_ops.h"
#include "model/deepseek.h"
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
  std::unique_ptr<Ops> ops = make_cpu_ops(config, cpu_dtype(options.precision), options.num_threads);
  Weights weights = load_weights(config, checkpoint, *ops);
  return std::make_unique<DeepSeek>(config, std::move(weights), std::move(ops));
}

}  // namespace flash_mla::model
