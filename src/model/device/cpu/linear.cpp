#include "model/device/cpu/linear.h"

#include <utility>

namespace flash_mla::model {

std::vector<float> read_values(const Weight& weight) {
  std::vector<float> out(static_cast<std::size_t>(weight.size()));
  weight.read(out.data());
  return out;
}

cpu::PackedWeight pack(const CpuContext& context, const float* weight, std::int64_t out_features,
                       std::int64_t in_features) {
  return context.quantize == ModelQuantize::kInt8
             ? context.gemm.pack_int8(weight, out_features, in_features, context.dtype)
             : context.gemm.pack(weight, out_features, in_features, context.dtype);
}

CpuLinear::CpuLinear(const CpuContext& context, const Weight& weight, std::vector<float> bias)
    : weight_(pack(context, read_values(weight).data(), weight.rows, weight.columns)),
      bias_(std::move(bias)) {}

void CpuLinear::multiply(const CpuContext& context, const Matrix& x, const Matrix& out) const {
  context.gemm.run(x, weight_, bias_.empty() ? nullptr : bias_.data(), out,
                   {context.threads, context.step->batch_invariant, false});
}

void CpuLinear::multiply_add(const CpuContext& context, const Matrix& x, const Matrix& inout) const {
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
