#include "model/device/cuda/weight_loader.h"

#include <vector>

#include "base/cuda/check.h"
#include "kernels/rows/sm90/rows.h"

namespace flash_mla::model {
namespace {

// Standard deviation of made-up weights: that of DeepSeek's own initialisation is 0.006, of others 0.02.
constexpr float kRandomDeviation = 0.02f;

}  // namespace

WeightUploader& WeightLoader::uploader() {
  if (!uploader_) uploader_ = std::make_unique<WeightUploader>(stream_);
  return *uploader_;
}

Buffer WeightLoader::vector(std::span<const float> values) {
  if (values.empty()) return {};
  Buffer out = pool_.allocate(values.size_bytes());
  check(cudaMemcpyAsync(out.data(), values.data(), values.size_bytes(), cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
  return out;
}

Buffer WeightLoader::matrix(const Weight& weight) {
  return matrix(read_bfloat16(weight).get(), weight.size());
}

Buffer WeightLoader::matrix(const std::uint16_t* values, std::int64_t count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(std::uint16_t);
  Buffer out = pool_.allocate(bytes);
  if (values != nullptr) {
    uploader().upload(reinterpret_cast<const std::byte*>(values), bytes, out.data());
  } else {
    sm90::fill_random(out.data(), DType::kBFloat16, count, seed_++, kRandomDeviation, stream_);
  }
  return out;
}

Buffer WeightLoader::float32_matrix(const Weight& weight) {
  if (weight.read) {
    std::vector<float> values(static_cast<std::size_t>(weight.size()));
    weight.read(values.data());
    return vector(values);
  }
  Buffer out = pool_.allocate(static_cast<std::size_t>(weight.size()) * sizeof(float));
  sm90::fill_random(out.data(), DType::kFloat32, weight.size(), seed_++, kRandomDeviation, stream_);
  return out;
}

std::unique_ptr<std::uint16_t[]> read_bfloat16(const Weight& weight) {
  if (!weight.read) return nullptr;
  auto out = std::make_unique_for_overwrite<std::uint16_t[]>(static_cast<std::size_t>(weight.size()));
  weight.read(out.get());
  return out;
}

}  // namespace flash_mla::model
