#include "model/device/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/attention/dense_prefill/cpu/dense_prefill.h"
#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {
namespace {

// Columns of every rank, which has as many heads as any other.
std::vector<Range> shares_of_heads(const Partition& partition, std::int64_t columns) {
  std::vector<Range> out;
  out.reserve(static_cast<std::size_t>(partition.size));
  for (int rank = 0; rank < partition.size; ++rank) out.push_back({rank * columns, columns});
  return out;
}

}  // namespace

CpuAttention::KeyValueWeights::KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b)
    : KeyValueWeights(context, kv_b, split_kv_b(context.config, kv_b.data())) {}

CpuAttention::KeyValueWeights::KeyValueWeights(const CpuContext& context, const std::vector<float>& kv_b,
                                               const AbsorbedHalves<float>& halves)
    : both(context.gemm.pack(kv_b.data(),
                             static_cast<std::int64_t>(kv_b.size()) / context.config.kv_lora_rank,
                             context.config.kv_lora_rank, context.dtype)),
      uk(context, halves.uk.data(), context.config.num_attention_heads, context.config.kv_lora_rank,
         context.config.qk_nope_head_dim),
      uv(context, halves.uv.data(), context.config.num_attention_heads, context.config.v_head_dim,
         context.config.kv_lora_rank) {}

CpuAttention::CpuAttention(CpuContext& context, const AttentionWeights& weights)
    : context_(context),
      norm_(weights.norm),
      qkv_a_(context, weights.qkv_a, LayerKind::kAttention, weights.qkv_a_bias),
      q_norm_(weights.q_norm),
      q_b_(weights.q_b.rows > 0 ? std::make_unique<CpuLinear>(context, weights.q_b, LayerKind::kAttention)
                                : nullptr),
      kv_norm_(weights.kv_norm),
      kv_b_(context, read_values(weights.kv_b)),
      o_(context, weights.o, LayerKind::kAttention,
         shares_of_heads(context.partition,
                         std::int64_t{context.config.num_attention_heads} * context.config.v_head_dim),
         weights.o_bias),
      indexer_(weights.indexer.q_b.rows > 0 ? std::make_unique<CpuIndexer>(context, weights.indexer)
                                            : nullptr),
      cache_(context) {}

std::size_t CpuAttention::bytes_per_page() const {
  return cache_.bytes_per_page() + (indexer_ ? indexer_->bytes_per_page() : 0);
}

void CpuAttention::free_cache() {
  cache_.free();
  if (indexer_) indexer_->free_cache();
}

void CpuAttention::allocate_cache(int num_pages) {
  cache_.allocate(num_pages);
  if (indexer_) indexer_->allocate_cache(num_pages);
}

void CpuAttention::clear_cache() {
  cache_.clear();
  if (indexer_) indexer_->clear_cache();
}

void CpuAttention::copy_page(int source, int target) {
  cache_.copy_page(source, target);
  if (indexer_) indexer_->copy_page(source, target);
}

std::array<std::span<std::byte>, 2> CpuAttention::page(int index) const {
  return {cache_.page(index), indexer_ ? indexer_->page(index) : std::span<std::byte>()};
}

std::string CpuAttention::page_format() const {
  return "cpu, " + cache_.format() + (indexer_ ? ", " + indexer_->format() : "");
}

bool CpuAttention::has_plain_rows() const { return !indexer_ && cache_.has_plain_rows(); }

void CpuAttention::forward(Residual& x, Rows rows) {
  if (x.x.rows == 0) return;
  const ModelConfig& config = context_.config;
  Matrix h = context_.activations(context_.buffers.h, x.x.rows, config.hidden_size);
  context_.rms_norm(x.x, norm_, config.rms_norm_eps, h);
  Projected projected = project(h);
  rope_and_append(projected);
  if (indexer_) indexer_->append(h);
  const Step& step = *context_.step;
  const bool has_prompt = step.num_absorbed < step.num_tokens();
  const bool wants_all = std::ssize(step.logit_rows) >= step.num_tokens();
  if (rows == Rows::kLogits && (has_prompt || !wants_all)) {
    auto& buffers = context_.buffers;
    if (indexer_) {
      context_.narrow({{&x.x, &buffers.logit_x},
                       {&projected.q, &buffers.logit_q},
                       {&h, &buffers.logit_index_h},
                       {&projected.q_a, &buffers.logit_q_a}});
    } else {
      context_.narrow({{&x.x, &buffers.logit_x}, {&projected.q, &buffers.logit_q}});
    }
  }
  if (x.x.rows == 0) return;
  if (indexer_ && context_.selects()) indexer_->select(h, projected.q_a);
  const Matrix attended = context_.activations(context_.buffers.attended, x.x.rows,
                                               std::int64_t{config.num_attention_heads} * config.v_head_dim);
  attend(projected.q, attended);
  o_.multiply_add(context_, attended, x.x);
}

// Queries, latents and keys of h, before rope.
CpuAttention::Projected CpuAttention::project(const Matrix& h) {
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

// Rotates the rope part of every head of q in place; normalises the latents, rotates the rope part of the
// keys and writes both to the tokens' slots of the cache.
void CpuAttention::rope_and_append(const Projected& projected) {
  const ModelConfig& config = context_.config;
  const Matrix &q = projected.q, &kv = projected.kv;
  const std::int64_t rank = config.kv_lora_rank, rope = config.qk_rope_head_dim, pairs = rope / 2;
  const std::int64_t nope = config.qk_nope_head_dim, element = context_.element();
  const DType dtype = context_.dtype;
  std::byte* const own = cache_.rows();
  const Matrix keys =
      own != nullptr ? Matrix{} : context_.activations(context_.buffers.keys, q.rows, rank + rope);
  context_.for_rows(q.rows, q.columns + kv.columns, [&](std::int64_t t) {
    const float* cosines = context_.cosines.data() + t * pairs;
    const float* sines = context_.sines.data() + t * pairs;
    const std::int64_t slot = context_.step->slots[static_cast<std::size_t>(t)];
    std::byte* key = own != nullptr ? own + slot * (rank + rope) * element : keys.row(t);
    cpu::rows::rms_norm(kv.row(t), kv_norm_.data(), static_cast<float>(checkpoint::kLatentNormEps), key,
                        dtype, rank);
    std::memcpy(key + rank * element, kv.row(t) + rank * element, static_cast<std::size_t>(rope * element));
    cpu::rows::rotate(key + rank * element, cosines, sines, dtype, pairs);
    for (std::int64_t h = 0; h < config.num_attention_heads; ++h) {
      cpu::rows::rotate(q.row(t) + (h * (nope + rope) + nope) * element, cosines, sines, dtype, pairs);
    }
  });
  if (own == nullptr) cache_.append(keys);
}

// Attention of q, rotated, over the cache: the step's absorbed tokens, then its chunks.
void CpuAttention::attend(const Matrix& q, const Matrix& out) {
  const std::int64_t absorbed = context_.step->num_absorbed, expanded = q.rows - absorbed;
  if (absorbed > 0) {
    const Step& step = *context_.step;
    if (context_.selects()) fill_slots(0, absorbed);
    lists_.clear();
    for (const CpuContext::Runs& runs : context_.runs) {
      Lists& lists = lists_.emplace_back();
      const bool chosen = context_.selects();
      lists.width = chosen ? context_.index_topk() : step.max_blocks;
      lists.page_size = chosen ? 1 : kPageSize;
      lists.table = (chosen ? slots_.data() : step.absorbed_table.data()) + runs.first * lists.width;
      lists.lengths = runs.lengths.data();
      lists.count = std::ssize(runs.lengths);
      lists.schedule = runs.schedule.view();
      lists.run = runs.tokens;
    }
    absorbed_attention(q.row_range(0, absorbed), out.row_range(0, absorbed), lists_);
  }
  if (expanded > 0) expanded_attention(q.row_range(absorbed, expanded), out.row_range(absorbed, expanded));
}

// q_latent[h] = [q_nope[h] · W_UK[h] | q_rope[h]]; out_latent = softmax(scale * q_latent · cache^T) · cache;
// out[h] = out_latent[h] · W_UV[h]^T.
void CpuAttention::absorbed_attention(const Matrix& q, const Matrix& out, std::span<const Lists> lists) {
  const ModelConfig& config = context_.config;
  const std::int64_t heads = config.num_attention_heads, element = context_.element();
  const std::int64_t nope = config.qk_nope_head_dim, rope = config.qk_rope_head_dim;
  const std::int64_t rank = config.kv_lora_rank;
  const Matrix q_latent = context_.activations(context_.buffers.q_latent, q.rows, heads * (rank + rope));
  const Matrix out_latent = context_.activations(context_.buffers.out_latent, q.rows, heads * rank);
  kv_b_.uk.multiply(context_, q, nope + rope, q_latent, rank + rope, [&](std::int64_t h) {
    for (std::int64_t t = 0; t < q.rows; ++t) {
      std::memcpy(q_latent.row(t) + (h * (rank + rope) + rank) * element,
                  q.row(t) + (h * (nope + rope) + nope) * element, static_cast<std::size_t>(rope * element));
    }
  });
  std::int64_t first = 0;
  for (const Lists& of : lists) {
    const std::int64_t tokens = of.count * of.run;
    cache_.attend(q_latent.row_range(first, tokens), out_latent.row_range(first, tokens), of,
                  context_.buffers.decode_workspace);
    first += tokens;
  }
  kv_b_.uv.multiply(context_, out_latent, rank, out, config.v_head_dim, [](std::int64_t) {});
}

// Causal attention of the step's chunks with keys and values expanded from the cached latents.
void CpuAttention::expanded_attention(const Matrix& q, const Matrix& out) {
  const ModelConfig& config = context_.config;
  const Step& step = *context_.step;
  const std::byte* const rows = cache_.rows();
  const kv::Pool pool = rows != nullptr ? kv::Pool{} : cache_.pool();
  // Many chunks: one for each thread at a time. Few: each is shared.
  const auto chunks = std::ssize(step.chunks);
  const bool whole = chunks / 2 >= context_.threads;
  parallel_for(chunks, whole ? context_.threads : 1, [&](std::int64_t i) {
    const Chunk& chunk = step.chunks[static_cast<std::size_t>(i)];
    const std::int64_t first = chunk.first_token - step.num_absorbed;
    const std::int64_t tokens = whole_tokens(chunk);
    if (tokens == 0) return;
    cpu::DensePrefill args;
    args.heads = config.num_attention_heads;
    args.nope = config.qk_nope_head_dim;
    args.rope = config.qk_rope_head_dim;
    args.v = config.v_head_dim;
    args.rank = config.kv_lora_rank;
    args.scale = static_cast<float>(config.softmax_scale());
    args.q = q.row_range(first, tokens);
    args.out = out.row_range(first, tokens);
    args.cache = rows;
    args.pool = rows != nullptr ? nullptr : &pool;
    args.pages = chunk.pages;
    args.seq_len = chunk.seq_len - (chunk.num_tokens - tokens);
    args.kv_b = &kv_b_.both;
    args.num_threads = whole ? 1 : context_.threads;
    args.batch_invariant = step.batch_invariant;
    cpu::dense_prefill(context_.gemm, args);
  });
  if (context_.selects()) chosen_attention(q, out);
}

// Tokens of a chunk that attend to everything before them: they come first.
std::int64_t CpuAttention::whole_tokens(const Chunk& chunk) const {
  if (!context_.selects()) return chunk.num_tokens;
  const std::int64_t begin = chunk.seq_len - chunk.num_tokens;
  return std::clamp<std::int64_t>(context_.index_topk() - begin, 0, chunk.num_tokens);
}

// The other tokens of the step's chunks, each over the slots chosen for it, in the absorbed form. In pieces: a
// token's absorbed queries take (rank + rope) / (nope + rope) times the room that they took before.
void CpuAttention::chosen_attention(const Matrix& q, const Matrix& out) {
  constexpr std::int64_t kPiece = 256;
  const Step& step = *context_.step;
  for (const Chunk& chunk : step.chunks) {
    for (std::int64_t at = whole_tokens(chunk); at < chunk.num_tokens; at += kPiece) {
      const std::int64_t count = std::min(kPiece, chunk.num_tokens - at), token = chunk.first_token + at;
      fill_slots(token, count);
      const DecodeSchedule schedule =
          DecodeSchedule::build(lengths_, context_.schedule_options(step.batch_invariant));
      const std::int64_t row = token - step.num_absorbed;
      const Lists lists{slots_.data(), context_.index_topk(), 1, lengths_.data(), count, schedule.view(), 1};
      absorbed_attention(q.row_range(row, count), out.row_range(row, count), {&lists, 1});
    }
  }
}

void CpuAttention::fill_slots(std::int64_t first, std::int64_t count) {
  const std::int64_t topk = context_.index_topk();
  const Step& step = *context_.step;
  slots_.resize(static_cast<std::size_t>(count * topk));
  lengths_.resize(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t token = first + i, length = context_.length(token);
    std::int32_t* to = slots_.data() + i * topk;
    lengths_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(std::min(length, topk));
    if (length > topk) {
      std::copy_n(context_.selection.data() + token * topk, topk, to);
      continue;
    }
    // All that there are: only an absorbed token has so few here.
    const std::int32_t* pages = step.absorbed_table.data() + token * step.max_blocks;
    for (std::int64_t j = 0; j < length; ++j) {
      to[j] = static_cast<std::int32_t>(pages[j / kPageSize] * std::int64_t{kPageSize} + j % kPageSize);
    }
  }
}

}  // namespace flash_mla::model
