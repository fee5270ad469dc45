#include "model/device/cuda/mixture_of_experts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/moe/sm90/local_experts.h"
#include "kernels/moe/sm90/norm_route.h"

namespace flash_mla::model {
namespace {

MixtureWeights routed_alone(MixtureWeights weights) {
  weights.shared_gate_up = weights.shared_down = {};
  return weights;
}

}  // namespace

CudaMixtureOfExperts::CudaMixtureOfExperts(CudaContext& context, const MixtureWeights& all)
    : context_(context),
      norm_(context.weights.vector(all.norm)),
      router_(context.weights.float32_matrix(all.router)),
      correction_bias_(context.weights.vector(all.correction_bias)),
      intermediate_(all.intermediate),
      num_experts_(context.config.n_routed_experts + context.shared_experts()),
      index_(context.buffers.expert_ids.size()),
      counts_(context.pool->allocate(static_cast<std::size_t>(context.config.n_routed_experts) *
                                     sizeof(unsigned long long))),
      copies_(context.stream, context.device),
      host_counts_(allocate_pinned(counts_.bytes())) {
  check(cudaMemsetAsync(counts_.data(), 0, counts_.bytes(), context.stream), "cudaMemsetAsync");
  context.buffers.expert_ids.emplace_back();
  if (context.exchange) {
    place_experts(all.ranks);
    if (all.shared_down.rows > 0)
      shared_.emplace(context, all.shared_gate_up, all.shared_down, LayerKind::kShared);
  }
  const MixtureWeights weights = context.exchange ? routed_alone(all) : all;
  if (!weights.expert) {
    make_up_experts();
  } else if (takes_int4_experts(weights)) {
    const ExpertParts parts = ExpertParts::int4(context.config.hidden_size, intermediate_);
    upload(parts, int4_experts(weights, context.config.n_routed_experts, parts));
    gate_up_.int4 = down_.int4 = true;
  } else if (takes_e4m3_experts(weights)) {
    read_e4m3_experts(weights);
  } else {
    read_experts(weights);
  }
  if (gate_up_.e4m3()) context.prepare_e4m3(context.config.hidden_size);
  if (gate_up_.int4) context.prepare_int4();
}

// Of each routed expert, by the ranks that have it.
void CudaMixtureOfExperts::place_experts(const std::vector<std::vector<int>>& ranks) {
  std::vector<sm90::ExpertPlace> places;
  for (int e = 0; e < context_.config.n_routed_experts; ++e) {
    const std::vector<int>& of = ranks[static_cast<std::size_t>(e)];
    const auto found = std::ranges::find(of, context_.partition.expert_rank);
    sm90::ExpertPlace& place = places.emplace_back();
    place.replicas = static_cast<std::int32_t>(of.size());
    if (found == of.end()) continue;
    place.index = static_cast<std::int32_t>(own_.size());
    place.turn = static_cast<std::int32_t>(found - of.begin());
    own_.push_back(e);
    replicas_.push_back(place.replicas);
  }
  num_experts_ = static_cast<int>(own_.size());
  const std::size_t bytes = places.size() * sizeof(sm90::ExpertPlace);
  places_ = context_.pool->allocate(bytes);
  check(cudaMemcpyAsync(places_.data(), places.data(), bytes, cudaMemcpyHostToDevice, context_.stream),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(context_.stream), "cudaStreamSynchronize");
}

// An expert's share of the columns of the shared ones' `down` has scales of its own.
bool CudaMixtureOfExperts::cuts_shared_experts(std::int64_t scale_columns) const {
  return context_.shared_experts() <= 1 || intermediate_ % scale_columns == 0;
}

// Whether all of them are stored in e4m3, or to be quantised so. All are of one form; else they become bfloat16.
bool CudaMixtureOfExperts::takes_e4m3_experts(const MixtureWeights& weights) const {
  const bool cuts = cuts_shared_experts(kE4m3Columns);
  const bool sizes = takes_e4m3(2 * intermediate_, context_.config.hidden_size) &&
                     intermediate_ % kE4m3Rows == 0 && takes_e4m3(context_.config.hidden_size, intermediate_);
  if (context_.weights.quantises(LayerKind::kExperts)) {
    if (cuts && sizes) return true;
    throw_for_sizes("fp8");
  }
  return cuts && sizes && all_experts(weights, context_.config.n_routed_experts, stored_as_e4m3);
}

// The same of 4 bits.
bool CudaMixtureOfExperts::takes_int4_experts(const MixtureWeights& weights) const {
  const bool cuts = cuts_shared_experts(kInt4Group);
  const bool sizes = takes_int4(intermediate_, context_.config.hidden_size) &&
                     takes_int4(context_.config.hidden_size, intermediate_);
  if (context_.weights.quantises_int4(LayerKind::kExperts)) {
    if (cuts && sizes) return true;
    throw_for_sizes("w4a8");
  }
  if (context_.weights.quantises(LayerKind::kExperts)) return false;  // to e4m3
  return cuts && sizes && all_experts(weights, context_.config.n_routed_experts, stored_as_int4);
}

void CudaMixtureOfExperts::throw_for_sizes(const char* quantize) const {
  throw Unsupported(fmt::format(
      "quantize is {}: moe_intermediate_size is {} and hidden_size {}; device cuda takes both divisible by 16, and with "
      "several shared experts moe_intermediate_size divisible by {}; use device cpu",
      quantize, intermediate_, context_.config.hidden_size, kE4m3Columns));
}

// Elements of an expert's `down`; of its `gate_up` there are twice as many.
std::int64_t CudaMixtureOfExperts::expert_elements() const {
  return std::int64_t{context_.config.hidden_size} * intermediate_;
}

void CudaMixtureOfExperts::make_up_experts() {
  const std::int64_t hidden = context_.config.hidden_size;
  WeightLoader& loader = context_.weights;
  // The sizes are those of takes_..._experts(), which throw for others.
  if (loader.quantises(LayerKind::kExperts) && takes_e4m3_experts({})) {
    gate_up_ = loader.made_up_e4m3(num_experts_, 2 * intermediate_, hidden);
    down_ = loader.made_up_e4m3(num_experts_, hidden, intermediate_);
    return;
  }
  if (loader.quantises_int4(LayerKind::kExperts) && takes_int4_experts({})) {
    gate_up_ = loader.made_up_int4(num_experts_, 2 * intermediate_, hidden);
    down_ = loader.made_up_int4(num_experts_, hidden, intermediate_);
    return;
  }
  gate_up_ = {loader.matrix(nullptr, std::int64_t{2} * num_experts_ * expert_elements()), {}};
  down_ = {loader.matrix(nullptr, num_experts_ * expert_elements()), {}};
}

void CudaMixtureOfExperts::upload(const ExpertParts& parts, const ReadExpert& read) {
  const auto experts = static_cast<std::size_t>(num_experts_);
  const auto allocate = [&](std::size_t bytes) {
    return bytes > 0 ? context_.pool->allocate(experts * bytes) : Buffer{};
  };
  gate_up_ = {allocate(parts.gate_up_codes), allocate(parts.gate_up_scales)};
  down_ = {allocate(parts.down_codes), allocate(parts.down_scales)};
  for (int e = 0; e < num_experts_; ++e) {
    const auto part = [e](const Buffer& buffer, std::size_t bytes) {
      return WeightUploader::Part{buffer.data() + static_cast<std::size_t>(e) * bytes, bytes};
    };
    context_.weights.uploader().upload(
        {part(gate_up_.values, parts.gate_up_codes), part(down_.values, parts.down_codes),
         part(gate_up_.scales, parts.gate_up_scales), part(down_.scales, parts.down_scales)},
        [&](std::byte* host) { read(context_.exchange ? own_[static_cast<std::size_t>(e)] : e, host); });
  }
}

void CudaMixtureOfExperts::read_e4m3_experts(const MixtureWeights& weights) {
  const ExpertParts parts = ExpertParts::e4m3(context_.config.hidden_size, intermediate_);
  const ReadExpert read = e4m3_experts(weights, context_.config.n_routed_experts, parts);
  bool halves = true, whole = true;
  upload(parts, [&](int e, std::byte* host) {
    read(e, host);
    halves &= in_halves_of_blocks(parts.scales_of_gate_up(host), 2 * intermediate_, parts.hidden);
    whole &= in_whole_blocks(parts.scales_of_down(host), parts.hidden, intermediate_);
  });
  gate_up_.halves_of_blocks = halves;
  down_.whole_blocks = whole;
}

void CudaMixtureOfExperts::read_experts(const MixtureWeights& weights) {
  ExpertParts parts;
  parts.down_codes = static_cast<std::size_t>(expert_elements()) * sizeof(std::uint16_t);
  parts.gate_up_codes = 2 * parts.down_codes;
  upload(parts, bfloat16_experts(weights, context_.config.n_routed_experts));
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
    layer.counts = reinterpret_cast<unsigned long long*>(counts_.data());
    return;
  }
  const Matrix h = context_.activations(context_.buffers.h, tokens, x.x.columns);
  context_.activations(context_.buffers.expert_weights, tokens, context_.experts_per_token(),
                       DType::kFloat32);
  norm_and_route(x.x, h);
  if (context_.exchange) {
    add_from_ranks(h, x.x);
    x.normed_for = next_;
    return;
  }
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
  args.counts = reinterpret_cast<unsigned long long*>(counts_.data());
  args.slots = context_.data.slots;
  args.tokens = h.rows;
  args.hidden = h.columns;
  args.routing = config.routing();
  args.routing.shared_experts = context_.shared_experts();
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
  args.int4 = gate_up_.int4;
  args.ids = reinterpret_cast<const std::int32_t*>(ids().data());
  if (context_.exchange) {
    args.ids = reinterpret_cast<const std::int32_t*>(context_.buffers.local_ids.data());
    args.of_experts = context_.config.n_routed_experts;
  }
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
  if (next_ != nullptr && !context_.exchange) {
    args.norm = next_->norm();
    args.norm_eps = static_cast<float>(context_.config.rms_norm_eps);
    args.norm_out = h.data;
    args.norm_stride = h.stride;
  }
  check(sm90::expert_ffn(args, context_.stream), "expert_ffn");
}

// On a stream of its own: no step waits for it, and it for none.
ExpertCounts CudaMixtureOfExperts::expert_counts() const {
  ExpertCounts out;
  out.counts.resize(counts_.bytes() / sizeof(unsigned long long));
  {
    const std::lock_guard lock(mutex_);
    copies_.copy(host_counts_.data(), counts_.data(), counts_.bytes());
    copies_.mark()->wait();
    std::memcpy(out.counts.data(), host_counts_.data(), counts_.bytes());
  }
  std::int64_t here = std::accumulate(out.counts.begin(), out.counts.end(), std::int64_t{0});
  if (context_.exchange) {
    here = 0;
    for (std::size_t i = 0; i < own_.size(); ++i)
      here += out.counts[static_cast<std::size_t>(own_[i])] / replicas_[i];
  }
  out.rank_counts = {here};
  return out;
}

// Of the step's choices those that are this rank's, as its own experts are numbered.
void CudaMixtureOfExperts::find_local(std::int64_t tokens) {
  const Matrix local =
      context_.activations(context_.buffers.local_ids, tokens, context_.experts_per_token(), DType::kInt32);
  sm90::LocalExperts args;
  args.ids = reinterpret_cast<const std::int32_t*>(ids().data());
  args.places = reinterpret_cast<const sm90::ExpertPlace*>(places_.data());
  args.out = reinterpret_cast<std::int32_t*>(local.data);
  args.tokens = tokens;
  args.experts_per_token = context_.experts_per_token();
  args.by_turn = !context_.step->batch_invariant;
  check(sm90::local_experts(args, context_.stream), "local_experts");
}

// The same of ranks: one sum for the shared and the routed experts.
void CudaMixtureOfExperts::add_from_ranks(const Matrix& h, const Matrix& x) {
  const Matrix partial = context_.partial(h.rows);
  if (shared_) {
    shared_->run(context_, h, partial, /*accumulate=*/false);
  } else {
    const auto bytes = static_cast<std::size_t>(partial.rows * partial.columns) * dtype_size(partial.dtype);
    check(cudaMemsetAsync(partial.data, 0, bytes, context_.stream), "cudaMemsetAsync");
  }
  if (num_experts_ > 0) {
    find_local(h.rows);
    add_experts(h, partial);
  }
  RankExchange::Norm norm;
  if (next_ != nullptr) norm = {next_->norm(), static_cast<float>(context_.config.rms_norm_eps), h};
  context_.exchange->add_sum(partial, x, norm);
}

std::vector<std::int32_t> CudaMixtureOfExperts::experts_taken(int num_tokens) const {
  std::vector<std::int32_t> out(static_cast<std::size_t>(num_tokens * context_.experts_per_token()));
  const std::size_t bytes = out.size() * sizeof(std::int32_t);
  if (out.empty() || ids().bytes() < bytes) return {};
  context_.download(ids().data(), bytes, out.data());
  return out;
}

}  // namespace flash_mla::model
