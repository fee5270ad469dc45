#include "model/device/cuda/attention.h"

#include "base/cuda/check.h"
#include "flash_mla/decode.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/gemm/sm90/head_gemm.h"
#include "kernels/rows/sm90/rows.h"
#include "model/model.h"

namespace flash_mla::model {
namespace {

constexpr DType kType = DType::kBFloat16;

// Of values to be read; made-up ones are not the halves of kv_b: the two forms of attention are different
// functions of such a model.
AbsorbedHalves<std::uint16_t> halves_of(const ModelConfig& config, const std::uint16_t* kv_b) {
  if (kv_b == nullptr) return {};
  return split_kv_b(config, kv_b);
}

const std::uint16_t* data_or_null(const std::vector<std::uint16_t>& values) {
  return values.empty() ? nullptr : values.data();
}

}  // namespace

CudaAttention::KeyValueWeights::KeyValueWeights(CudaContext& context, const Weight& kv_b)
    : KeyValueWeights(context, kv_b, read_bfloat16(kv_b).get()) {}

CudaAttention::KeyValueWeights::KeyValueWeights(CudaContext& context, const Weight& kv_b,
                                                const std::uint16_t* values)
    : KeyValueWeights(context, kv_b, values, halves_of(context.config, values)) {}

CudaAttention::KeyValueWeights::KeyValueWeights(CudaContext& context, const Weight& kv_b,
                                                const std::uint16_t* values,
                                                const AbsorbedHalves<std::uint16_t>& halves)
    : both(context, values, kv_b.rows, kv_b.columns),
      uk(context, data_or_null(halves.uk), context.config.num_attention_heads, context.config.kv_lora_rank,
         context.config.qk_nope_head_dim),
      uv(context, data_or_null(halves.uv), context.config.num_attention_heads, context.config.v_head_dim,
         context.config.kv_lora_rank) {}

CudaAttention::CudaAttention(CudaContext& context, const AttentionWeights& weights)
    : context_(context),
      norm_(context.weights.vector(weights.norm)),
      qkv_a_(context, weights.qkv_a, weights.qkv_a_bias),
      q_norm_(context.weights.vector(weights.q_norm)),
      q_b_(weights.q_b.rows > 0 ? std::make_unique<CudaLinear>(context, weights.q_b) : nullptr),
      kv_norm_(context.weights.vector(weights.kv_norm)),
      kv_b_(context, weights.kv_b),
      o_(context, weights.o, weights.o_bias),
      indexer_(weights.indexer.q_b.rows > 0 ? std::make_unique<CudaIndexer>(context, weights.indexer)
                                            : nullptr),
      cache_(context) {}

std::size_t CudaAttention::bytes_per_page() const {
  return cache_.bytes_per_page() + (indexer_ ? indexer_->bytes_per_page() : 0);
}

void CudaAttention::free_cache() {
  cache_.free();
  if (indexer_) indexer_->free_cache();
}

void CudaAttention::allocate_cache(int num_pages) {
  cache_.allocate(num_pages);
  if (indexer_) indexer_->allocate_cache(num_pages);
}

void CudaAttention::clear_cache() {
  cache_.clear();
  if (indexer_) indexer_->clear_cache();
}

void CudaAttention::copy_page(int source, int target) {
  cache_.copy_page(source, target);
  if (indexer_) indexer_->copy_page(source, target);
}

std::array<std::span<std::byte>, 2> CudaAttention::page(int index) const {
  return {cache_.page(index), indexer_ ? indexer_->page(index) : std::span<std::byte>()};
}

std::string CudaAttention::page_format() const {
  return "cuda, " + cache_.format() + (indexer_ ? ", " + indexer_->format() : "");
}

bool CudaAttention::has_plain_rows() const { return !indexer_ && cache_.has_plain_rows(); }

void CudaAttention::forward(Residual& x, Rows /*rows*/) {
  if (context_.is_one_token_step()) {
    list(context_.one_token.add_layer());
    return;
  }
  const ModelConfig& config = context_.config;
  const std::int64_t tokens = x.x.rows, absorbed = context_.step->num_absorbed, expanded = tokens - absorbed;
  const Matrix h = context_.activations(context_.buffers.h, tokens, config.hidden_size);
  if (x.normed_for != this) context_.rms_norm(x.x, norm_, config.rms_norm_eps, h);
  x.normed_for = nullptr;
  const auto [q, kv, q_a] = project(h);
  if (indexer_) indexer_->append(h);
  if (indexer_ && context_.selects()) indexer_->select(h, q_a);
  const Matrix attended = context_.activations(context_.buffers.attended, tokens,
                                               std::int64_t{config.num_attention_heads} * config.v_head_dim);
  if (absorbed > 0) {
    absorbed_attention({q.row_range(0, absorbed), kv.row_range(0, absorbed)},
                       attended.row_range(0, absorbed));
  }
  if (expanded > 0) {
    const Matrix chunk_q = q.row_range(absorbed, expanded);
    rope_and_append({chunk_q, kv.row_range(absorbed, expanded)}, absorbed);
    const Matrix chunk_out = attended.row_range(absorbed, expanded);
    expanded_attention(chunk_q, chunk_out);
    listed_attention(chunk_q, chunk_out);
  }
  o_.multiply_add(context_, attended, x.x);
}

// As a layer of one_token(): the first half of its weights.
void CudaAttention::list(sm90::OneTokenLayer& layer) const {
  layer.qkv = qkv_a_.weight();
  layer.w_uk = kv_b_.uk.weight();
  layer.w_uv = kv_b_.uv.weight();
  layer.o = o_.weight();
  layer.input_norm = norm();
  layer.kv_norm = floats(kv_norm_);
  layer.cache = cache_.rows();
}

// Queries, latents and keys of h, before rope.
CudaAttention::Projected CudaAttention::project(const Matrix& h) {
  const ModelConfig& config = context_.config;
  const std::int64_t heads = config.num_attention_heads, rope = config.qk_rope_head_dim;
  const std::int64_t q_width = heads * (config.qk_nope_head_dim + rope),
                     kv_width = config.kv_lora_rank + rope;
  const std::int64_t q_a_width = q_b_ ? config.q_lora_rank : q_width;

  const Matrix qkv_a = context_.activations(context_.buffers.qkv_a, h.rows, q_a_width + kv_width);
  qkv_a_.multiply(context_, h, qkv_a);
  const Matrix kv = qkv_a.column_range(q_a_width, kv_width);
  Matrix q = qkv_a.column_range(0, q_a_width);
  Matrix q_a;
  if (q_b_) {
    q_a = context_.activations(context_.buffers.q_a, h.rows, q_a_width);
    context_.rms_norm(q, q_norm_, checkpoint::kLatentNormEps, q_a);
    q = context_.activations(context_.buffers.q, h.rows, q_width);
    q_b_->multiply(context_, q_a, q);
  }
  return {q, kv, q_a};
}

// Where keys of `tokens` tokens go before they are in the cache: into it, where it has their rows.
Matrix CudaAttention::key_rows(std::int64_t tokens) {
  const std::int64_t width = std::int64_t{context_.config.kv_lora_rank} + context_.config.qk_rope_head_dim;
  if (cache_.rows() != nullptr) return {cache_.rows(), kType, 0, width, width};
  return context_.activations(context_.buffers.keys, tokens, width);
}

// Of the step's absorbed tokens, before rope. One kernel turns and absorbs the queries,
// q_latent[h] = [q_nope[h] · W_UK[h] | rope(q_rope[h])], and appends latents and keys to the cache; then
// out_latent = softmax(scale * q_latent · cache^T) · cache and out[h] = out_latent[h] · W_UV[h]^T.
void CudaAttention::absorbed_attention(const Projected& projected, const Matrix& out) {
  const ModelConfig& config = context_.config;
  const std::int64_t tokens = projected.q.rows, heads = config.num_attention_heads;
  const std::int64_t rank = config.kv_lora_rank, rope = config.qk_rope_head_dim;
  const Matrix q_latent = context_.activations(context_.buffers.q_latent, tokens, heads * (rank + rope));
  const Matrix out_latent = context_.activations(context_.buffers.out_latent, tokens, heads * rank);
  sm90::HeadGemm absorb = kv_b_.uk.product(projected.q, q_latent, config.qk_rope_head_dim);
  absorb.cosines = context_.rotations.cosines;
  absorb.sines = context_.rotations.sines;
  absorb.append.kv = projected.kv;
  absorb.append.norm = floats(kv_norm_);
  absorb.append.eps = static_cast<float>(checkpoint::kLatentNormEps);
  const Matrix keys = key_rows(tokens);
  absorb.append.slots = cache_.rows() != nullptr ? context_.data.slots : nullptr;
  absorb.append.cache = keys.data;
  absorb.append.rank = config.kv_lora_rank;
  sm90::head_gemm(absorb, context_.stream);
  if (cache_.rows() == nullptr) cache_.append(keys, 0);
  if (context_.selects()) {
    cache_.attend_listed(q_latent, out_latent, 0);
  } else {
    decode(q_latent, out_latent);
  }
  sm90::head_gemm(kv_b_.uv.product(out_latent, out, 0), context_.stream);
}

// Attention of the step's absorbed tokens over the cache: each is a request, or those of a sequence are one.
void CudaAttention::decode(const Matrix& q_latent, const Matrix& out_latent) {
  const ModelConfig& config = context_.config;
  const StepData& data = context_.data;
  if (!has_sm90_decode(config)) {
    sm90::PlainDecode args;
    args.q = q_latent;
    args.out = out_latent;
    args.cache = cache_.rows();
    args.lens = data.lens;
    args.table = data.table;
    args.max_blocks = data.max_blocks;
    args.heads = config.num_attention_heads;
    args.rank = config.kv_lora_rank;
    args.rope = config.qk_rope_head_dim;
    args.scale = static_cast<float>(config.softmax_scale());
    sm90::plain_decode(args, context_.stream);
    return;
  }
  const std::int64_t each = context_.tokens_per_request(), n = context_.step->num_absorbed / each;
  const std::int64_t heads = config.num_attention_heads;
  const std::int64_t rank = config.kv_lora_rank, width = rank + config.qk_rope_head_dim;
  DenseDecodeArgs args;
  args.q = on_device(q_latent.data, kType, {n, each, heads, width});
  args.k_cache = on_device(cache_.rows(), kType, {cache_.num_pages(), kPageSize, 1, width});
  args.block_table = on_device(data.table, DType::kInt32, {n, data.max_blocks});
  args.block_table.strides[0] = each * data.max_blocks;
  args.cache_seqlens = on_device(data.request_lens, DType::kInt32, {n});
  args.out = on_device(out_latent.data, kType, {n, each, heads, rank});
  DenseDecodeOptions options;
  options.softmax_scale = static_cast<float>(config.softmax_scale());
  options.causal = each > 1;
  options.stream = context_.stream;
  const std::size_t bytes = dense_decode_workspace_size(args, context_.schedule, options);
  context_.grow(context_.buffers.decode_workspace, bytes);
  dense_decode(args, context_.schedule, context_.buffers.decode_workspace.data(), bytes, options);
}

// Of the step's chunks, q rotated: the tokens that attend to lists, in the absorbed form.
void CudaAttention::listed_attention(const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  const std::int64_t heads = config.num_attention_heads, rank = config.kv_lora_rank;
  const std::int64_t width = rank + config.qk_rope_head_dim;
  for (const StepData::Listed& part : context_.data.listed) {
    const std::int64_t row = part.first_token - context_.step->num_absorbed;
    const Matrix q_latent = context_.activations(context_.buffers.q_latent, part.num_tokens, heads * width);
    const Matrix out_latent =
        context_.activations(context_.buffers.out_latent, part.num_tokens, heads * rank);
    sm90::head_gemm(kv_b_.uk.product(q.row_range(row, part.num_tokens), q_latent, config.qk_rope_head_dim),
                    context_.stream);
    cache_.attend_listed(q_latent, out_latent, part.first_token);
    sm90::head_gemm(kv_b_.uv.product(out_latent, out.row_range(row, part.num_tokens), 0), context_.stream);
  }
}

}  // namespace flash_mla::model
