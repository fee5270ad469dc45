#include "model/device/cuda/weight_loader.h"

#include <fmt/format.h>

#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/gemm/sm90/widen_weights.h"
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

CudaMatrix WeightLoader::matrix(const Weight& weight, LayerKind kind) {
  if (stored_as_e4m3(weight)) {
    E4m3Weight stored(weight.rows, weight.columns);
    if (read_e4m3(weight, stored.codes.get(), stored.scales.data())) return upload(stored);
  }
  if (!quantises(kind)) return {matrix(weight), {}};
  check_takes_e4m3(weight);
  if (!weight.read) return made_up_e4m3(1, weight.rows, weight.columns);
  E4m3Weight made(weight.rows, weight.columns);
  quantise_e4m3(read_bfloat16(weight).get(), weight.rows, weight.columns, made.codes.get(),
                made.scales.data());
  return upload(made);
}

CudaMatrix WeightLoader::upload(const E4m3Weight& weight) {
  const auto bytes = static_cast<std::size_t>(weight.rows * weight.columns);
  CudaMatrix out{pool_.allocate(bytes), vector(weight.scales)};
  out.whole_blocks = in_whole_blocks(weight.scales.data(), weight.rows, weight.columns);
  out.halves_of_blocks = in_halves_of_blocks(weight.scales.data(), weight.rows, weight.columns);
  uploader().upload(reinterpret_cast<const std::byte*>(weight.codes.get()), bytes, out.values.data());
  return out;
}

CudaMatrix WeightLoader::made_up_e4m3(std::int64_t matrices, std::int64_t rows, std::int64_t columns) {
  const std::int64_t count = matrices * rows * columns;
  const auto scales = static_cast<std::size_t>(matrices * e4m3_scales(rows, columns));
  CudaMatrix out{pool_.allocate(static_cast<std::size_t>(count)),
                 vector(std::vector<float>(scales, kRandomDeviation / sm90::kRandomE4m3Deviation))};
  out.whole_blocks = out.halves_of_blocks = true;
  check(sm90::fill_random_e4m3(out.values.data(), count, seed_++, stream_), "fill_random_e4m3");
  return out;
}

CudaMatrix WeightLoader::made_up_int4(std::int64_t matrices, std::int64_t rows, std::int64_t columns) {
  const std::size_t bytes = static_cast<std::size_t>(matrices) * int4_bytes(rows, columns);
  const auto scales = static_cast<std::size_t>(matrices * int4_scales(rows, columns));
  CudaMatrix out{pool_.allocate(bytes),
                 vector(std::vector<float>(scales, kRandomDeviation / sm90::kRandomInt4Deviation))};
  out.int4 = true;
  check(sm90::fill_random_int4(out.values.data(), static_cast<std::int64_t>(bytes / sizeof(std::uint32_t)),
                               seed_++, stream_),
        "fill_random_int4");
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

void check_takes_e4m3(const Weight& weight) {
  if (takes_e4m3(weight.rows, weight.columns)) return;
  throw Unsupported(fmt::format(
      "quantize is fp8: {} is {} x {}; device cuda takes rows divisible by {} and columns divisible by 16; use "
      "device cpu",
      weight.tensors.empty() ? "a weight" : "tensor " + weight.tensors.front(), weight.rows, weight.columns,
      kE4m3Rows));
}

std::unique_ptr<std::uint16_t[]> read_bfloat16(const Weight& weight) {
  if (!weight.read) return nullptr;
  auto out = std::make_unique_for_overwrite<std::uint16_t[]>(static_cast<std::size_t>(weight.size()));
  weight.read(out.get());
  return out;
}

}  // namespace flash_mla::model
