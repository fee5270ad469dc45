#include "model/device/cuda/mixture_of_experts.h"

#include <algorithm>
#include <memory>

#include "base/cuda/check.h"
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
  if (weights.expert) {
    read_experts(weights);
  } else {
    make_up_experts();
  }
}

// Elements of an expert's `down`; of its `gate_up` there are twice as many.
std::int64_t CudaMixtureOfExperts::expert_elements() const {
  return std::int64_t{context_.config.hidden_size} * intermediate_;
}

void CudaMixtureOfExperts::make_up_experts() {
  gate_up_ = context_.weights.matrix(nullptr, num_experts_ * 2 * expert_elements());
  down_ = context_.weights.matrix(nullptr, num_experts_ * expert_elements());
}

void CudaMixtureOfExperts::read_experts(const MixtureWeights& weights) {
  const int routed = context_.config.n_routed_experts;
  const std::size_t down_bytes = static_cast<std::size_t>(expert_elements()) * sizeof(std::uint16_t);
  const std::size_t gate_up_bytes = 2 * down_bytes;
  const SharedExperts shared(weights);
  gate_up_ = context_.pool->allocate(static_cast<std::size_t>(num_experts_) * gate_up_bytes);
  down_ = context_.pool->allocate(static_cast<std::size_t>(num_experts_) * down_bytes);
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
    context_.weights.uploader().upload({{gate_up_.data() + expert * gate_up_bytes, gate_up_bytes},
                                        {down_.data() + expert * down_bytes, down_bytes}},
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
    layer.gate_up = gate_up_.data();
    layer.down = down_.data();
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
  args.gate_up = gate_up_.data();
  args.down = down_.data();
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
