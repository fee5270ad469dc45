#include "model/device/cuda/context.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "base/cuda/check.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "kernels/moe/sm90/moe.h"
#include "model/rope.h"

namespace flash_mla::model {
namespace {

// Tokens of the largest step that is recorded.
constexpr std::int64_t kMaxRecordedTokens = 256;
// Blocks of 64 keys between the fixed split points of a batch-invariant step.
constexpr int kInvariantSplitBlocks = 16;
// Of the keys and values that prefill attention expands at a time.
constexpr std::int64_t kMaxExpandedBytes = std::int64_t{1} << 31;
constexpr std::int64_t kElement = 2;

// Rows from which on products in FP8 are quicker than those that expand the weights of a GPU's few rows.
constexpr std::int64_t kFp8Rows = 64;

std::int64_t fp8_rows_of_environment() {
  constexpr const char* kName = "FLASH_MLA_FP8_ROWS";
  const char* const value = std::getenv(kName);
  if (value == nullptr) return kFp8Rows;
  const std::string_view text = value;
  std::int64_t rows = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rows);
  if (error != std::errc{} || end != text.data() + text.size() || rows < 0) {
    throw InvalidArgument(
        fmt::format("{} is \"{}\", expected a number of rows, or 0 for never", kName, text));
  }
  return rows > 0 ? rows : std::numeric_limits<std::int64_t>::max();
}

// Whether an absorbed token is the next of the sequence of the one in front of it: their pages are the same.
bool follows(const Step& step, std::int64_t token) {
  const auto at = static_cast<std::size_t>(token), blocks = static_cast<std::size_t>(step.max_blocks);
  if (step.absorbed_lens[at] != step.absorbed_lens[at - 1] + 1) return false;
  const auto row = step.absorbed_table.begin() + static_cast<std::ptrdiff_t>(at * blocks);
  const auto before = row - static_cast<std::ptrdiff_t>(blocks);
  return std::equal(before, before + (step.absorbed_lens[at - 1] + kPageSize - 1) / kPageSize, row);
}

// Absorbed tokens from the first on that are one sequence's.
std::int64_t length_of_first_run(const Step& step, std::int64_t tokens) {
  std::int64_t length = std::min<std::int64_t>(tokens, 1);
  while (length < tokens && follows(step, length)) ++length;
  return length;
}

// Query rows that decode attention has in one tile: up to as many it takes a token's time for several.
constexpr std::int64_t kDecodeRows = 64;

}  // namespace

bool has_sm90_prefill(const ModelConfig& config) {
  return config.qk_nope_head_dim == sm90::kPrefillHeadDimNope &&
         config.qk_rope_head_dim == sm90::kPrefillHeadDimRope && config.v_head_dim == sm90::kPrefillHeadDimV;
}

CudaContext::CudaContext(const ModelConfig& model_config, ModelQuantize quantize, bool fp8_latents)
    : config(model_config),
      fp8_cache(fp8_latents),
      fp8_rows(fp8_rows_of_environment()),
      weights(*pool, stream, quantize),
      schedule_options_(cuda_schedule_options(0, 1, model_config.num_attention_heads, 1)) {
  const Rope rope = make_rope(config);
  inv_freq_ = weights.vector(rope.inv_freq);
  rotations.inv_freq = floats(inv_freq_);
  rotations.scale = rope.scale;
  rotations.pairs = config.qk_rope_head_dim / 2;
  parts_ = pool->allocate(static_cast<std::size_t>(schedule_options_.num_parts) * sizeof(DecodePart));
  one_token = OneTokenPass(config, *pool, stream);
}

// In a batch-invariant step nothing depends on how many sequences there are.
ScheduleOptions CudaContext::schedule_options(int sequences, bool batch_invariant, int tokens) const {
  if (!batch_invariant) return cuda_schedule_options(0, tokens, config.num_attention_heads, 1, sequences);
  ScheduleOptions options = schedule_options_;
  options.fixed_split_blocks = kInvariantSplitBlocks;
  return options;
}

void CudaContext::reserve(std::int64_t num_tokens, std::int64_t num_rows) {
  const std::int64_t tokens = padded(num_tokens), rows = padded(num_rows);
  const std::int64_t hidden = config.hidden_size, heads = config.num_attention_heads;
  const std::int64_t latent = config.kv_lora_rank, rope = config.qk_rope_head_dim;
  const std::int64_t q_width = heads * (config.qk_nope_head_dim + rope), q_rank = config.q_lora_rank;
  const std::int64_t intermediate =
      std::max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size);
  activations(buffers.x, tokens, hidden);
  activations(buffers.h, tokens, hidden);
  activations(buffers.qkv_a, tokens, (q_rank > 0 ? q_rank : q_width) + latent + rope);
  activations(buffers.q_a, tokens, q_rank);
  activations(buffers.q, tokens, q_rank > 0 ? q_width : 0);
  activations(buffers.q_latent, tokens, heads * (latent + rope));
  activations(buffers.out_latent, tokens, heads * latent);
  activations(buffers.attended, tokens, heads * config.v_head_dim);
  activations(buffers.act, tokens, intermediate);
  for (Buffer& ids : buffers.expert_ids) activations(ids, tokens, experts_per_token(), DType::kInt32);
  activations(buffers.expert_weights, tokens, experts_per_token(), DType::kFloat32);
  activations(buffers.logit_h, rows, hidden);
  activations(buffers.logits, rows, config.vocab_size, DType::kFloat32);
  activations(buffers.tokens, rows, 1, DType::kInt32);
  rules.reserve(num_rows, config.vocab_size, *pool);
  if (keeps_states) {
    activations(buffers.states, tokens, hidden);
    activations(buffers.own_states, rows, hidden);
    activations(buffers.joined, tokens, 2 * hidden);
  }

  const std::int64_t recorded_tokens = std::min(tokens, kMaxRecordedTokens);
  grow_step_buffers(tokens, recorded_tokens, recorded_tokens);
  if (config.n_routed_experts > 0) {
    activations(buffers.router_logits, tokens, config.n_routed_experts, DType::kFloat32);
    grow(buffers.expert_workspace,
         sm90::expert_ffn_workspace_size(tokens, hidden, config.moe_intermediate_size,
                                         config.n_routed_experts + config.n_shared_experts,
                                         experts_per_token()));
  }
  if (tokens >= fp8_rows && widest_e4m3_ > 0) quantised_rows(buffers.quantised, tokens, widest_e4m3_);
  // Prompts that are processed whole.
  grow_expanded(tokens);
  activations(buffers.keys, fp8_cache ? tokens : 0, latent + rope);
  if (config.index_topk > 0) reserve_index(tokens);
  weights.finish();
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

// Scores of the longest sequences; shorter ones have no larger chunks of them.
void CudaContext::reserve_index(std::int64_t tokens) {
  const std::int64_t width = std::int64_t{config.index_n_heads} * config.index_head_dim;
  activations(buffers.index_k, tokens, config.index_head_dim);
  activations(buffers.index_q, tokens, width);
  activations(buffers.index_weights, tokens, config.index_n_heads, DType::kFloat32);
  activations(buffers.index_values, tokens, width, DType::kUInt8);
  activations(buffers.index_scaled_weights, tokens, config.index_n_heads, DType::kFloat32);
  activations(buffers.selection, tokens, config.index_topk, DType::kInt32);
  const auto pages = static_cast<std::size_t>((config.max_position_embeddings + kPageSize - 1) / kPageSize);
  const std::size_t row = std::bit_ceil(pages) * kPageSize * sizeof(float),
                    rows = static_cast<std::size_t>(tokens);
  // Behind a length for each row.
  grow(buffers.index_workspace,
       std::min(rows * row, std::max(row, kIndexLogitsBytes)) + (rows + 64) * sizeof(std::int32_t));
}

bool CudaContext::has_to_select(const Step& next) const {
  if (config.index_topk == 0) return false;
  // Attention over lists reads an FP8 cache, and takes heads of any dimensions.
  if (fp8_cache || next.batch_invariant) return true;
  if (!next.chunks.empty() && !has_sm90_prefill(config)) return true;
  return std::ranges::any_of(next.positions,
                             [&](std::int32_t position) { return position >= config.index_topk; });
}

void CudaContext::begin_step(Step& next) {
  recorded = next.chunks.empty() && next.num_tokens() <= kMaxRecordedTokens;
  step = &next;
  const std::int64_t unpadded = next.num_absorbed;
  // Tokens that fill a step up would choose experts of their own.
  if (recorded) pad(next, is_one_token_step() ? next.num_tokens() : padded(next.num_tokens()));
  grow_step_buffers(next.num_tokens(), next.num_absorbed, std::ssize(next.logit_rows));
  const std::int64_t key_bytes =
      std::int64_t{config.num_attention_heads} * (config.qk_nope_head_dim + config.v_head_dim) * kElement;
  selects_ = has_to_select(next);
  tokens_per_request_ = count_tokens_per_request(next, unpadded);
  StepCut cut;
  cut.tokens_per_request = tokens_per_request_;
  cut.most_keys = kMaxExpandedBytes / key_bytes;
  cut.index_topk = config.index_topk;
  if (selects_) cut.dense_keys = fp8_cache || !has_sm90_prefill(config) ? 0 : config.index_topk;
  data = uploader_.upload(next, cut, *pool, stream);
}

void CudaContext::begin_pass() {
  one_token.begin(step->reads == ModuleStates::kNone);
  if (step->num_absorbed == 0 || !has_sm90_decode(config) || is_one_token_step() || selects_) return;
  const std::int64_t requests = step->num_absorbed / tokens_per_request_;
  const ScheduleOptions options = schedule_options(static_cast<int>(requests), step->batch_invariant,
                                                   static_cast<int>(tokens_per_request_));
  schedule = schedule_view(options, requests);
  build_decode_schedule(on_device(data.request_lens, DType::kInt32, {requests}), options, schedule, stream);
}

// Not batch-invariant ones: larger batches take other kernels.
bool CudaContext::is_one_token_step() const {
  return one_token.fits(step->reads == ModuleStates::kNone) && recorded && !step->batch_invariant &&
         step->num_tokens() <= sm90::kMaxOneTokens && step->num_absorbed > 0 &&
         length_of_first_run(*step, step->num_absorbed) == step->num_absorbed;
}

// Where all sequences check as many drafts. Not in batch-invariant steps: the bits of a request of several tokens are others.
std::int64_t CudaContext::count_tokens_per_request(const Step& next, std::int64_t unpadded) const {
  if (next.batch_invariant || selects_ || !has_sm90_decode(config)) return 1;
  const std::int64_t each = length_of_first_run(next, unpadded);
  if (each <= 1 || each * config.num_attention_heads > kDecodeRows || unpadded % each != 0 ||
      next.num_absorbed % each != 0) {
    return 1;
  }
  for (std::int64_t i = each; i < unpadded; ++i) {
    if (i % each != 0 && !follows(next, i)) return 1;
  }
  return each;
}

void CudaContext::finish_layers(const Matrix& x) {
  if (is_one_token_step() && one_token.pending()) one_token.run(data, rotations, x, stream);
}

void CudaContext::grow(Buffer& buffer, std::size_t bytes) {
  if (bytes > buffer.bytes()) {
    buffer = {};
    buffer = pool->allocate(bytes);
  }
}

Matrix CudaContext::activations(Buffer& buffer, std::int64_t rows, std::int64_t columns, DType dtype) {
  grow(buffer, static_cast<std::size_t>(rows * columns) * dtype_size(dtype));
  return {buffer.data(), dtype, rows, columns, columns};
}

void CudaContext::grow_expanded(std::int64_t keys) {
  activations(buffers.latents, keys, config.kv_lora_rank);
  activations(buffers.k_rope, keys, config.qk_rope_head_dim);
  activations(buffers.expanded, keys,
              std::int64_t{config.num_attention_heads} * (config.qk_nope_head_dim + config.v_head_dim));
}

void CudaContext::prepare_e4m3(std::int64_t columns) {
  grow(buffers.widened, static_cast<std::size_t>(kMaxWidenedBytes));
  widest_e4m3_ = std::max(widest_e4m3_, columns);
  one_token = {};
}

void CudaContext::prepare_int4() { one_token = {}; }

QuantisedRows CudaContext::quantised_rows(Buffer& buffer, std::int64_t rows, std::int64_t columns) {
  // Of whole 16 bytes, since rows are.
  const auto codes = static_cast<std::size_t>(rows * columns);
  const auto scales = static_cast<std::size_t>(rows * ((columns + kE4m3Columns - 1) / kE4m3Columns));
  grow(buffer, codes + scales * sizeof(float));
  return {buffer.data(), reinterpret_cast<float*>(buffer.data() + codes)};
}

void CudaContext::download(const std::byte* from, std::size_t bytes, void* to) {
  std::byte* staging = download_.grow(bytes);
  check(cudaMemcpyAsync(staging, from, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  std::memcpy(to, staging, bytes);
}

void CudaContext::rms_norm(const Matrix& x, const Buffer& weight, double eps, const Matrix& out) const {
  sm90::rms_norm(x, floats(weight), static_cast<float>(eps), out, stream);
}

std::int64_t CudaContext::padded(std::int64_t num_tokens) const {
  if (num_tokens > kMaxRecordedTokens) return num_tokens;
  std::int64_t size = 1;
  while (size < num_tokens && size < 8) size *= 2;
  return std::max(size, (num_tokens + 7) / 8 * 8 * (num_tokens > 8));
}

// To a size that is recorded: with tokens that see no key and are not cached, and with logits for all.
void CudaContext::pad(Step& next, std::int64_t num_tokens) {
  const auto size = static_cast<std::size_t>(num_tokens);
  next.token_ids.resize(size, 0);
  next.positions.resize(size, 0);
  next.slots.resize(size, -1);
  if (next.reads != ModuleStates::kNone) next.states.resize(size, 0);
  next.absorbed_lens.resize(size, 0);
  next.absorbed_table.resize(size * static_cast<std::size_t>(next.max_blocks), 0);
  next.num_absorbed = static_cast<std::int64_t>(size);
  next.logit_rows.resize(size, 0);
  next.first_chosen = 0;
  if (!next.draws.empty()) next.draws.resize(size);
}

void CudaContext::grow_step_buffers(std::int64_t tokens, std::int64_t absorbed, std::int64_t logit_rows) {
  const auto pairs = static_cast<std::size_t>(tokens * rotations.pairs) * sizeof(float);
  grow(cosines_, pairs);
  grow(sines_, pairs);
  rotations.cosines = reinterpret_cast<float*>(cosines_.data());
  rotations.sines = reinterpret_cast<float*>(sines_.data());
  grow(num_splits_, static_cast<std::size_t>(absorbed + 1) * sizeof(std::int32_t));
  const std::size_t bytes = sm90::likeliest_scratch_bytes(logit_rows);
  if (bytes > buffers.likeliest_scratch.bytes()) {
    grow(buffers.likeliest_scratch, bytes);
    check(cudaMemsetAsync(buffers.likeliest_scratch.data(), 0, bytes, stream), "cudaMemsetAsync");
  }
}

DecodeScheduleView CudaContext::schedule_view(const ScheduleOptions& options, std::int64_t requests) const {
  DecodeScheduleView view;
  view.parts = on_device(parts_.data(), DType::kInt32, {options.num_parts, 8});
  view.num_splits = on_device(num_splits_.data(), DType::kInt32, {requests + 1});
  view.block_size = options.block_size;
  view.fixed_split_blocks = options.fixed_split_blocks;
  return view;
}

}  // namespace flash_mla::model
