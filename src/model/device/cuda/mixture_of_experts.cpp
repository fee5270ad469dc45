#include "model/device/cuda/mixture_of_experts.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/moe/sm90/norm_route.h"

namespace flash_mla::model {
namespace {

// The shared experts as one network, of the same form and `count` times the width of an expert, cut into
// experts.
class SharedExperts {
 public:
  explicit SharedExperts(const MixtureWeights& weights)
      : hidden_(weights.router.columns),
        intermediate_(weights.intermediate),
        width_(weights.shared_down.columns),
        gate_up_(read_bfloat16(weights.shared_gate_up)),
        down_(read_bfloat16(weights.shared_down)) {}

  /// The s-th: (2 * intermediate, hidden) and (hidden, intermediate).
  void copy(std::int64_t s, std::uint16_t* gate_up, std::uint16_t* down) const {
    const std::int64_t size = intermediate_ * hidden_;
    std::copy_n(gate_up_.get() + s * size, size, gate_up);
    std::copy_n(gate_up_.get() + width_ * hidden_ + s * size, size, gate_up + size);
    for (std::int64_t row = 0; row < hidden_; ++row) {
      std::copy_n(down_.get() + row * width_ + s * intermediate_, intermediate_, down + row * intermediate_);
    }
  }

 private:
  std::int64_t hidden_, intermediate_, width_;
  std::unique_ptr<std::uint16_t[]> gate_up_, down_;
};

/// An expert's parts in e4m3, as they lie behind each other in memory for uploads.
struct E4m3Parts {
  E4m3Parts(std::int64_t hidden_size, std::int64_t width)
      : hidden(hidden_size),
        intermediate(width),
        gate_up_codes(static_cast<std::size_t>(2 * width * hidden)),
        down_codes(static_cast<std::size_t>(width * hidden)),
        gate_up_scales(static_cast<std::size_t>(e4m3_scales(2 * width, hidden)) * sizeof(float)),
        down_scales(static_cast<std::size_t>(e4m3_scales(hidden, width)) * sizeof(float)) {}

  std::uint8_t* gate_up(std::byte* host) const { return reinterpret_cast<std::uint8_t*>(host); }
  std::uint8_t* down(std::byte* host) const { return gate_up(host) + gate_up_codes; }
  // Codes come in whole rows of 16 bytes, so that scales are aligned.
  float* scales_of_gate_up(std::byte* host) const {
    return reinterpret_cast<float*>(host + gate_up_codes + down_codes);
  }
  float* scales_of_down(std::byte* host) const {
    return scales_of_gate_up(host) + gate_up_scales / sizeof(float);
  }

  std::int64_t hidden, intermediate;
  std::size_t gate_up_codes, down_codes, gate_up_scales, down_scales;  // bytes
};

/// Into `codes` and `scales`: as it is stored, or quantised. Throws Unsupported, naming the tensor, where the stored
/// scales are not of 8 rows.
void read_or_quantise(const Weight& weight, std::uint8_t* codes, float* scales) {
  if (!stored_as_e4m3(weight)) {
    quantise_e4m3(read_bfloat16(weight).get(), weight.rows, weight.columns, codes, scales);
  } else if (!read_e4m3(weight, codes, scales)) {
    throw Unsupported(
        fmt::format("tensor {}: rows within {} have different scales; device cuda takes blocks of whole {}",
                    weight.tensors.front(), kE4m3Rows, kE4m3Rows));
  }
}

/// SharedExperts in e4m3.
class SharedE4m3Experts {
 public:
  explicit SharedE4m3Experts(const MixtureWeights& weights)
      : width_(weights.shared_down.columns),
        gate_up_(weights.shared_gate_up.rows, weights.shared_gate_up.columns),
        down_(weights.shared_down.rows, weights.shared_down.columns) {
    if (width_ == 0) return;
    read_or_quantise(weights.shared_gate_up, gate_up_.codes.get(), gate_up_.scales.data());
    read_or_quantise(weights.shared_down, down_.codes.get(), down_.scales.data());
  }

  void copy(std::int64_t s, const E4m3Parts& parts, std::byte* host) const {
    const std::int64_t intermediate = parts.intermediate, hidden = parts.hidden;
    const std::int64_t scales = e4m3_scales(intermediate, hidden);
    const E4m3Cut gate{s * intermediate, intermediate, 0, hidden};
    const E4m3Cut up{width_ + s * intermediate, intermediate, 0, hidden};
    std::uint8_t* const gate_up = parts.gate_up(host);
    cut_e4m3(gate_up_, gate, gate_up, parts.scales_of_gate_up(host));
    cut_e4m3(gate_up_, up, gate_up + intermediate * hidden, parts.scales_of_gate_up(host) + scales);
    cut_e4m3(down_, {0, hidden, s * intermediate, intermediate}, parts.down(host),
             parts.scales_of_down(host));
  }

 private:
  std::int64_t width_;
  E4m3Weight gate_up_, down_;
};

}  // namespace

CudaMixtureOfExperts::CudaMixtureOfExperts(CudaContext& context, const MixtureWeights& weights)
    : context_(context),
      norm_(context.weights.vector(weights.norm)),
      router_(context.weights.float32_matrix(weights.router)),
      correction_bias_(context.weights.vector(weights.correction_bias)),
      intermediate_(weights.intermediate),
      num_experts_(context.config.n_routed_experts + context.config.n_shared_experts),
      index_(context.buffers.expert_ids.size()) {
  context.buffers.expert_ids.emplace_back();
  if (!weights.expert) {
    make_up_experts();
  } else if (takes_e4m3_experts(weights)) {
    read_e4m3_experts(weights);
  } else {
    read_experts(weights);
  }
  if (gate_up_.e4m3()) context.prepare_e4m3(context.config.hidden_size);
}

// Whether all of them are stored in e4m3, or to be quantised so. All are of one form; else they become bfloat16.
bool CudaMixtureOfExperts::takes_e4m3_experts(const MixtureWeights& weights) const {
  const bool asked = context_.weights.quantises(LayerKind::kExperts);
  // An expert's share of the columns of the shared ones' `down` has scales of its own.
  const bool cuts = context_.config.n_shared_experts <= 1 || intermediate_ % kE4m3Columns == 0;
  const bool sizes = takes_e4m3(2 * intermediate_, context_.config.hidden_size) &&
                     intermediate_ % kE4m3Rows == 0 && takes_e4m3(context_.config.hidden_size, intermediate_);
  if (asked) {
    if (cuts && sizes) return true;
    throw Unsupported(fmt::format(
        "quantize is fp8: moe_intermediate_size is {} and hidden_size {}; device cuda takes both divisible by 16, and with "
        "several shared experts moe_intermediate_size divisible by {}; use device cpu",
        intermediate_, context_.config.hidden_size, kE4m3Columns));
  }
  if (!cuts || !sizes) return false;
  if (weights.shared_down.rows > 0 &&
      !(stored_as_e4m3(weights.shared_gate_up) && stored_as_e4m3(weights.shared_down))) {
    return false;
  }
  for (int e = 0; e < context_.config.n_routed_experts; ++e) {
    const ExpertWeights expert = weights.expert(e);
    if (!stored_as_e4m3(expert.gate_up) || !stored_as_e4m3(expert.down)) return false;
  }
  return true;
}

// Elements of an expert's `down`; of its `gate_up` there are twice as many.
std::int64_t CudaMixtureOfExperts::expert_elements() const {
  return std::int64_t{context_.config.hidden_size} * intermediate_;
}

void CudaMixtureOfExperts::make_up_experts() {
  const std::int64_t hidden = context_.config.hidden_size;
  WeightLoader& loader = context_.weights;
  // The sizes are those of takes_e4m3_experts(), which throws for others.
  if (loader.quantises(LayerKind::kExperts) && takes_e4m3_experts({})) {
    gate_up_ = loader.made_up_e4m3(num_experts_, 2 * intermediate_, hidden);
    down_ = loader.made_up_e4m3(num_experts_, hidden, intermediate_);
    return;
  }
  gate_up_ = {loader.matrix(nullptr, std::int64_t{2} * num_experts_ * expert_elements()), {}};
  down_ = {loader.matrix(nullptr, num_experts_ * expert_elements()), {}};
}

void CudaMixtureOfExperts::read_e4m3_experts(const MixtureWeights& weights) {
  const int routed = context_.config.n_routed_experts;
  const E4m3Parts parts(context_.config.hidden_size, intermediate_);
  const SharedE4m3Experts shared(weights);
  const auto experts = static_cast<std::size_t>(num_experts_);
  const auto allocate = [&](std::size_t bytes) { return context_.pool->allocate(experts * bytes); };
  gate_up_ = {allocate(parts.gate_up_codes), allocate(parts.gate_up_scales), false, true};
  down_ = {allocate(parts.down_codes), allocate(parts.down_scales), true};
  for (int e = 0; e < num_experts_; ++e) {
    const auto read = [&](std::byte* host) {
      if (e >= routed) {
        shared.copy(e - routed, parts, host);
      } else {
        const ExpertWeights expert = weights.expert(e);
        read_or_quantise(expert.gate_up, parts.gate_up(host), parts.scales_of_gate_up(host));
        read_or_quantise(expert.down, parts.down(host), parts.scales_of_down(host));
      }
      gate_up_.halves_of_blocks &=
          in_halves_of_blocks(parts.scales_of_gate_up(host), 2 * intermediate_, parts.hidden);
      down_.whole_blocks &= in_whole_blocks(parts.scales_of_down(host), parts.hidden, intermediate_);
    };
    const auto part = [e](const Buffer& buffer, std::size_t bytes) {
      return WeightUploader::Part{buffer.data() + static_cast<std::size_t>(e) * bytes, bytes};
    };
    context_.weights.uploader().upload(
        {part(gate_up_.values, parts.gate_up_codes), part(down_.values, parts.down_codes),
         part(gate_up_.scales, parts.gate_up_scales), part(down_.scales, parts.down_scales)},
        read);
  }
}

void CudaMixtureOfExperts::read_experts(const MixtureWeights& weights) {
  const int routed = context_.config.n_routed_experts;
  const std::size_t down_bytes = static_cast<std::size_t>(expert_elements()) * sizeof(std::uint16_t);
  const std::size_t gate_up_bytes = 2 * down_bytes;
  const SharedExperts shared(weights);
  gate_up_.values = context_.pool->allocate(static_cast<std::size_t>(num_experts_) * gate_up_bytes);
  down_.values = context_.pool->allocate(static_cast<std::size_t>(num_experts_) * down_bytes);
  for (int e = 0; e < num_experts_; ++e) {
    const auto expert = static_cast<std::size_t>(e);
    const auto read = [&](std::byte* host) {
      if (e >= routed) {
        return shared.copy(e - routed, reinterpret_cast<std::uint16_t*>(host),
                           reinterpret_cast<std::uint16_t*>(host + gate_up_bytes));
      }
      const ExpertWeights read_expert = weights.expert(e);
      read_expert.gate_up.read(host);
      read_expert.down.read(host + gate_up_bytes);
    };
    context_.weights.uploader().upload({{gate_up_.values.data() + expert * gate_up_bytes, gate_up_bytes},
                                        {down_.values.data() + expert * down_bytes, down_bytes}},
                                       read);
  }
}

void CudaMixtureOfExperts::forward(Residual& x) {
  const std::int64_t tokens = x.x.rows;
  context_.activations(ids(), tokens, context_.experts_per_token(), DType::kInt32);
  if (context_.is_one_token_step()) {
    sm90::OneTokenLayer& layer = context_.one_token.layer();
    layer.post_attention_norm = floats(norm_);
    layer.router = floats(router_);
    layer.correction = floats(correction_bias_);
    layer.gate_up = gate_up_.values.data();
    layer.down = down_.values.data();
    layer.ids = reinterpret_cast<std::int32_t*>(ids().data());
    return;
  }
  const Matrix h = context_.activations(context_.buffers.h, tokens, x.x.columns);
  context_.activations(context_.buffers.expert_weights, tokens, context_.experts_per_token(),
                       DType::kFloat32);
  norm_and_route(x.x, h);
  add_experts(h, x.x);
  x.normed_for = next_;
}

// h = norm(x), and the experts of every row of it with their weights.
void CudaMixtureOfExperts::norm_and_route(const Matrix& x, const Matrix& h) {
  sm90::NormAndRoute args;
  args.route = route_args(h);
  args.in = x.data;
  args.in_stride = x.stride;
  args.norm = floats(norm_);
  args.eps = static_cast<float>(context_.config.rms_norm_eps);
  if (sm90::fits_norm_and_route(args)) {
    sm90::norm_and_route(args, context_.stream);
    return;
  }
  context_.rms_norm(x, norm_, context_.config.rms_norm_eps, h);
  check(sm90::route(args.route, context_.stream), "route");
}

sm90::RouteArgs CudaMixtureOfExperts::route_args(const Matrix& h) {
  const ModelConfig& config = context_.config;
  const Matrix logits =
      context_.activations(context_.buffers.router_logits, h.rows, config.n_routed_experts, DType::kFloat32);
  sm90::RouteArgs args;
  args.x = h.data;
  args.x_stride = h.stride;
  args.router = floats(router_);
  args.correction = floats(correction_bias_);
  args.logits = reinterpret_cast<float*>(logits.data);
  args.ids = reinterpret_cast<std::int32_t*>(ids().data());
  args.weights = reinterpret_cast<float*>(context_.buffers.expert_weights.data());
  args.tokens = h.rows;
  args.hidden = h.columns;
  args.routing = config.routing();
  args.batch_invariant = context_.step->batch_invariant;
  args.programmatic_launch = true;
  return args;
}

// x += the chosen experts of h, weighted; then h = norm(x) of the next layer, if there is one.
void CudaMixtureOfExperts::add_experts(const Matrix& h, const Matrix& x) {
  context_.grow(context_.buffers.expert_workspace,
                sm90::expert_ffn_workspace_size(h.rows, h.columns, intermediate_, num_experts_,
                                                context_.experts_per_token()));
  sm90::ExpertFfn args;
  args.x = h.data;
  args.x_stride = h.stride;
  args.gate_up = gate_up_.values.data();
  args.down = down_.values.data();
  args.gate_up_scales = floats(gate_up_.scales);
  args.down_scales = floats(down_.scales);
  args.ids = reinterpret_cast<const std::int32_t*>(ids().data());
  args.weights = reinterpret_cast<const float*>(context_.buffers.expert_weights.data());
  args.inout = x.data;
  args.inout_stride = x.stride;
  args.tokens = h.rows;
  args.hidden = h.columns;
  args.intermediate = intermediate_;
  args.num_experts = num_experts_;
  args.experts_per_token = context_.experts_per_token();
  args.workspace = context_.buffers.expert_workspace.data();
  args.batch_invariant = context_.step->batch_invariant;
  if (context_.multiplies_fp8(h.rows)) args.fp8_rows = 0;
  args.whole_blocks = gate_up_.halves_of_blocks && down_.whole_blocks;
  args.programmatic_launch = true;
  if (next_ != nullptr) {
    args.norm = next_->norm();
    args.norm_eps = static_cast<float>(context_.config.rms_norm_eps);
    args.norm_out = h.data;
    args.norm_stride = h.stride;
  }
  check(sm90::expert_ffn(args, context_.stream), "expert_ffn");
}

std::vector<std::int32_t> CudaMixtureOfExperts::experts_taken(int num_tokens) const {
  std::vector<std::int32_t> out(static_cast<std::size_t>(num_tokens * context_.experts_per_token()));
  const std::size_t bytes = out.size() * sizeof(std::int32_t);
  if (out.empty() || ids().bytes() < bytes) return {};
  context_.download(ids().data(), bytes, out.data());
  return out;
}

}  // namespace flash_mla::model
