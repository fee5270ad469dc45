#include "model/device/cuda/linear.h"

#include <algorithm>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "kernels/gemm/sm90/widen_weights.h"
#include "kernels/quant/sm90/quantise_rows.h"
#include "kernels/rows/sm90/rows.h"

namespace flash_mla::model {
namespace {

// Rows up to which a product is a matter of reading the weights, or of expanding e4m3.
constexpr std::int64_t kSkinnyRows = 64;

// Of a matrix with so many columns, those that fit into the memory for them; of whole blocks of scales.
std::int64_t widened_rows(std::int64_t columns) {
  return kMaxWidenedBytes / (2 * columns) / kFp8Block * kFp8Block;
}

int num_multiprocessors() {
  int count = 0;
  check(multiprocessors(count), "cudaDeviceGetAttribute");
  return count;
}

bool takes_quantise_rows(const Matrix& x) {
  return x.dtype == DType::kBFloat16 && x.columns % 16 == 0 && x.stride % 8 == 0;
}

void quantise(const CudaContext& context, const Matrix& x, const QuantisedRows& out) {
  sm90::QuantiseRows args;
  args.x = x.data;
  args.x_stride = x.stride;
  args.codes = out.codes;
  args.scales = out.scales;
  args.rows = x.rows;
  args.columns = x.columns;
  args.programmatic_launch = true;
  check(sm90::quantise_rows(args, context.stream), "quantise_rows");
}

}  // namespace

CudaLinear::CudaLinear(CudaContext& context, const Weight& weight, std::span<const float> bias,
                       LayerKind kind)
    : weight_(context.weights.matrix(weight, kind)),
      bias_(context.weights.vector(bias)),
      out_features_(weight.rows),
      in_features_(weight.columns) {
  if (weight_.e4m3()) context.prepare_e4m3(in_features_);
}

CudaLinear::CudaLinear(CudaContext& context, const std::uint16_t* weight, std::int64_t out_features,
                       std::int64_t in_features)
    : weight_{context.weights.matrix(weight, out_features * in_features), {}},
      out_features_(out_features),
      in_features_(in_features) {}

// Batch-invariant products are all made by the kernel that can do it.
bool CudaLinear::few_rows(const CudaContext& context, std::int64_t rows) const {
  if (context.step->batch_invariant) return true;
  return rows <= kSkinnyRows || (weight_.e4m3() && widened_rows(in_features_) == 0);
}

sm90::SkinnyGemm CudaLinear::skinny_args(const CudaContext& context, const Matrix& x,
                                         const Matrix& out) const {
  sm90::SkinnyGemm args;
  args.x = x.data;
  args.x_stride = x.stride;
  args.weight = weight_.values.data();
  args.weight_scales = floats(weight_.scales);
  args.bias = floats(bias_);
  args.out = out.data;
  args.out_stride = out.stride;
  args.m = x.rows;
  args.n = out_features_;
  args.k = in_features_;
  args.out_fp32 = out.dtype == DType::kFloat32;
  args.batch_invariant = context.step->batch_invariant;
  args.programmatic_launch = true;
  return args;
}

void CudaLinear::run(CudaContext& context, const Matrix& x, const Matrix& out, bool accumulate) const {
  const bool fp8 = takes_fp8(context, x, out);
  if (!fp8 && few_rows(context, x.rows)) {
    sm90::SkinnyGemm args = skinny_args(context, x, out);
    args.accumulate = accumulate;
    check(sm90::skinny_gemm(args, context.stream), "skinny_gemm");
    return;
  }
  if (bias_.bytes() > 0) {
    sm90::add_bias(floats(bias_), !accumulate, out, context.stream);
    accumulate = true;
  }
  if (fp8) return multiply_fp8(context, x, out, accumulate);
  if (weight_.e4m3()) return multiply_widened(context, x, out, accumulate);
  context.lt.gemm(x, weight_.values.data(), out, accumulate, context.stream);
}

/// But for what is done with the results.
sm90::Fp8Gemm CudaLinear::fp8_args(const QuantisedRows& x, std::int64_t rows) const {
  sm90::Fp8Gemm args;
  args.x = x.codes;
  args.x_stride = in_features_;
  args.x_scales = x.scales;
  args.x_rows = args.m = rows;
  args.weight = weight_.values.data();
  args.weight_scales = floats(weight_.scales);
  args.whole_blocks = weight_.whole_blocks;
  args.n = out_features_;
  args.k = in_features_;
  args.programmatic_launch = true;
  return args;
}

/// With memory for x, quantised.
sm90::Fp8Gemm CudaLinear::product_fp8(CudaContext& context, const Matrix& x, const Matrix& out) const {
  sm90::Fp8Gemm args =
      fp8_args(context.quantised_rows(context.buffers.quantised, x.rows, in_features_), x.rows);
  args.out = out.data;
  args.out_stride = out.stride;
  args.out_fp32 = out.dtype == DType::kFloat32;
  args.tiles = sm90::plan_fp8_gemm(x.rows, out_features_, 1, false, num_multiprocessors());
  return args;
}

bool CudaLinear::takes_fp8(CudaContext& context, const Matrix& x, const Matrix& out) const {
  return weight_.e4m3() && context.multiplies_fp8(x.rows) && takes_quantise_rows(x) &&
         sm90::fits_fp8_gemm(product_fp8(context, x, out));
}

void CudaLinear::multiply_fp8(CudaContext& context, const Matrix& x, const Matrix& out,
                              bool accumulate) const {
  sm90::Fp8Gemm args = product_fp8(context, x, out);
  args.accumulate = accumulate;
  quantise(context, x, context.quantised_rows(context.buffers.quantised, x.rows, in_features_));
  check(sm90::fp8_gemm(args, context.stream), "fp8_gemm");
}

bool CudaLinear::multiply_feed_forward(CudaContext& context, const Matrix& x, const CudaLinear& down,
                                       const Matrix& out, bool accumulate) const {
  if (!weight_.e4m3() || !down.weight_.e4m3() || bias_.bytes() > 0 || down.bias_.bytes() > 0 ||
      !context.multiplies_fp8(x.rows) || !takes_quantise_rows(x)) {
    return false;
  }
  // What lies in `act` as e4m3 with scales is less than the bfloat16 that it has room for.
  const QuantisedRows quantised = context.quantised_rows(context.buffers.quantised, x.rows, in_features_);
  const QuantisedRows act = context.quantised_rows(context.buffers.act, x.rows, down.in_features_);
  const int num_sms = num_multiprocessors();
  sm90::Fp8Gemm gate_up = fp8_args(quantised, x.rows);
  gate_up.whole_blocks = weight_.halves_of_blocks;
  gate_up.gather = gate_up.silu_quantise = true;
  gate_up.out = act.codes;
  gate_up.out_scales = act.scales;
  gate_up.tiles = sm90::plan_fp8_gemm(x.rows, out_features_, 1, true, num_sms);
  sm90::Fp8Gemm last = down.fp8_args(act, x.rows);
  last.out = out.data;
  last.out_stride = out.stride;
  last.accumulate = accumulate;
  last.tiles = sm90::plan_fp8_gemm(x.rows, down.out_features_, 1, false, num_sms);
  if (!sm90::fits_fp8_gemm(gate_up) || !sm90::fits_fp8_gemm(last)) return false;
  quantise(context, x, quantised);
  check(sm90::fp8_gemm(gate_up, context.stream), "fp8_gemm");
  check(sm90::fp8_gemm(last, context.stream), "fp8_gemm");
  return true;
}

// Panels of the weight, and so of out's columns, one after the other through the same memory.
void CudaLinear::multiply_widened(CudaContext& context, const Matrix& x, const Matrix& out,
                                  bool accumulate) const {
  const std::int64_t most = widened_rows(in_features_);
  const std::int64_t scale_columns = (in_features_ + kE4m3Columns - 1) / kE4m3Columns;
  std::byte* const widened = context.buffers.widened.data();
  for (std::int64_t row = 0; row < out_features_; row += most) {
    sm90::WidenWeights args;
    args.codes = weight_.values.data() + row * in_features_;
    args.scales = floats(weight_.scales) + row / kE4m3Rows * scale_columns;
    args.out = widened;
    args.rows = std::min(most, out_features_ - row);
    args.columns = in_features_;
    check(sm90::widen_weights(args, context.stream), "widen_weights");
    context.lt.gemm(x, widened, out.column_range(row, args.rows), accumulate, context.stream);
  }
}

void CudaLinear::multiply_silu_mul(CudaContext& context, const Matrix& x, const Matrix& out) const {
  if (few_rows(context, x.rows)) {
    sm90::SkinnyGemm args = skinny_args(context, x, out);
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
