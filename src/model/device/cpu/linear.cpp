#include "model/device/cpu/linear.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>

#include "kernels/quant/cpu/weights.h"

namespace flash_mla::model {

std::vector<float> read_values(const Weight& weight) {
  std::vector<float> out(static_cast<std::size_t>(weight.size()));
  weight.read(out.data());
  return out;
}

namespace {

/// Codes of a weight, and the scales of its rows and groups.
struct Codes {
  Codes(const Weight& weight, const QuantizedFormat& format)
      : codes(std::make_unique_for_overwrite<std::uint8_t[]>(static_cast<std::size_t>(weight.size()))),
        scales(static_cast<std::size_t>(weight.rows * format.groups(weight.columns))) {}
  std::unique_ptr<std::uint8_t[]> codes;
  std::vector<float> scales;
};

Codes quantise(const Weight& weight, const QuantizedFormat& format) {
  const std::vector<float> values = read_values(weight);
  Codes out(weight, format);
  if (format.type == QuantizedType::kInt4) {
    cpu::quantise_int4(values.data(), weight.rows, weight.columns, format.group, out.codes.get(),
                       out.scales.data());
    return out;
  }
  const std::int64_t groups = format.groups(weight.columns);
  std::vector<float> blocks(static_cast<std::size_t>((weight.rows + kFp8Block - 1) / kFp8Block * groups));
  cpu::quantise_fp8_blocks(values.data(), weight.rows, weight.columns, false, out.codes.get(), blocks.data());
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    std::copy_n(blocks.data() + row / kFp8Block * groups, groups, out.scales.data() + row * groups);
  }
  return out;
}

}  // namespace

cpu::PackedWeight pack(const CpuContext& context, const Weight& weight, LayerKind kind) {
  const std::int64_t rows = weight.rows, columns = weight.columns;
  if (context.quantize == ModelQuantize::kInt8) {
    return context.gemm.pack_int8(read_values(weight).data(), rows, columns, context.dtype);
  }
  const std::optional<QuantizedFormat> asked = quantized_format(context.quantize, kind);
  const bool as_stored = weight.stored && (!asked || *asked == *weight.stored) &&
                         cpu::Gemm::takes(*weight.stored, columns, context.dtype);
  if (as_stored) {
    Codes stored(weight, *weight.stored);
    weight.read_quantized(stored.codes.get(), stored.scales.data());
    return context.gemm.pack_quantized(stored.codes.get(), stored.scales.data(), *weight.stored, rows,
                                       columns, context.dtype);
  }
  if (asked) {
    const Codes made = quantise(weight, *asked);
    return context.gemm.pack_quantized(made.codes.get(), made.scales.data(), *asked, rows, columns,
                                       context.dtype);
  }
  const std::vector<float> values = read_values(weight);
  return context.panels ? context.gemm.pack_panels(values.data(), rows, columns, context.dtype)
                        : context.gemm.pack(values.data(), rows, columns, context.dtype);
}

CpuLinear::CpuLinear(const CpuContext& context, const Weight& weight, LayerKind kind, std::vector<float> bias)
    : weight_(pack(context, weight, kind)), bias_(std::move(bias)), tensors_(weight.tensors) {}

void CpuLinear::multiply(const CpuContext& context, const Matrix& x, const Matrix& out) const {
  if (context.on_product) context.on_product(tensors_, x);
  context.gemm.run(x, weight_, bias_.empty() ? nullptr : bias_.data(), out,
                   {context.threads, context.step->batch_invariant, false});
}

void CpuLinear::multiply_add(const CpuContext& context, const Matrix& x, const Matrix& inout) const {
  if (context.on_product) context.on_product(tensors_, x);
  context.gemm.run(x, weight_, bias_.empty() ? nullptr : bias_.data(), inout,
                   {context.threads, context.step->batch_invariant, true});
}

CpuHeadLinear::CpuHeadLinear(const CpuContext& context, const float* weights, std::int64_t heads,
                             std::int64_t out_features, std::int64_t in_features) {
  for (std::int64_t h = 0; h < heads; ++h) {
    heads_.push_back(context.gemm.pack(weights + h * out_features * in_features, out_features, in_features,
                                       context.dtype));
  }
}

}  // namespace flash_mla::model
