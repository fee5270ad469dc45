#include "model/device/cuda/linear.h"

#include "base/cuda/check.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/rows/sm90/rows.h"

namespace flash_mla::model {
namespace {

// Rows up to which a product is a matter of reading the weights.
constexpr std::int64_t kSkinnyRows = 64;

// Batch-invariant products are all made by the kernel that can do it.
bool few_rows(const CudaContext& context, const Matrix& x) {
  return x.rows <= kSkinnyRows || context.step->batch_invariant;
}

sm90::SkinnyGemm skinny_args(const CudaContext& context, const Matrix& x, const Matrix& out) {
  sm90::SkinnyGemm args;
  args.x = x.data;
  args.x_stride = x.stride;
  args.out = out.data;
  args.out_stride = out.stride;
  args.m = x.rows;
  args.out_fp32 = out.dtype == DType::kFloat32;
  args.batch_invariant = context.step->batch_invariant;
  args.programmatic_launch = true;
  return args;
}

}  // namespace

CudaLinear::CudaLinear(CudaContext& context, const Weight& weight, std::span<const float> bias)
    : weight_(context.weights.matrix(weight)),
      bias_(context.weights.vector(bias)),
      out_features_(weight.rows),
      in_features_(weight.columns) {}

CudaLinear::CudaLinear(CudaContext& context, const std::uint16_t* weight, std::int64_t out_features,
                       std::int64_t in_features)
    : weight_(context.weights.matrix(weight, out_features * in_features)),
      out_features_(out_features),
      in_features_(in_features) {}

void CudaLinear::run(CudaContext& context, const Matrix& x, const Matrix& out, bool accumulate) const {
  if (few_rows(context, x)) {
    sm90::SkinnyGemm args = skinny_args(context, x, out);
    args.weight = weight_.data();
    args.bias = floats(bias_);
    args.n = out_features_;
    args.k = in_features_;
    args.accumulate = accumulate;
    check(sm90::skinny_gemm(args, context.stream), "skinny_gemm");
    return;
  }
  if (bias_.bytes() > 0) {
    sm90::add_bias(floats(bias_), !accumulate, out, context.stream);
    accumulate = true;
  }
  context.lt.gemm(x, weight_.data(), out, accumulate, context.stream);
}

void CudaLinear::multiply_silu_mul(CudaContext& context, const Matrix& x, const Matrix& out) const {
  if (few_rows(context, x)) {
    sm90::SkinnyGemm args = skinny_args(context, x, out);
    args.weight = weight_.data();
    args.bias = floats(bias_);
    args.n = out_features_;
    args.k = in_features_;
    args.silu_mul = true;
    check(sm90::skinny_gemm(args, context.stream), "skinny_gemm");
    return;
  }
  const Matrix gate_up = context.activations(context.buffers.gate_up, x.rows, out_features_);
  multiply(context, x, gate_up);
  sm90::silu_mul(gate_up, out, context.stream);
}

CudaHeadLinear::CudaHeadLinear(CudaContext& context, const std::uint16_t* weights, std::int64_t heads,
                               std::int64_t out_features, std::int64_t in_features)
    : weight_(context.weights.matrix(weights, heads * out_features * in_features)),
      heads_(static_cast<int>(heads)),
      out_features_(static_cast<int>(out_features)),
      in_features_(static_cast<int>(in_features)) {}

sm90::HeadGemm CudaHeadLinear::product(const Matrix& x, const Matrix& out, int tail) const {
  sm90::HeadGemm args;
  args.x = x;
  args.out = out;
  args.weight = weight_.data();
  args.heads = heads_;
  args.out_features = out_features_;
  args.in_features = in_features_;
  args.tail = tail;
  args.x_width = in_features_ + tail;
  args.out_width = out_features_ + tail;
  return args;
}

}  // namespace flash_mla::model
