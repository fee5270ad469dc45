#include "model/device/cpu/indexer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "base/aligned.h"
#include "flash_mla/indexer.h"
#include "kernels/attention/indexer/cpu/indexer.h"
#include "kernels/attention/top_k/cpu/top_k.h"
#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {
namespace {

// Logits that are kept at a time; at least one token's always are.
constexpr std::int64_t kLogitsBytes = std::int64_t{64} << 20;
constexpr float kKeyNormEps = 1e-6f;

/// Scores that are products of e4m3 have keys and queries of this recipe.
constexpr Fp8Recipe kRecipe = Fp8Recipe::kIndexerPow2;

cpu::IndexElement element_of(DType dtype, bool fp8) {
  if (fp8) return cpu::IndexElement::kE4m3;
  return dtype == DType::kBFloat16 ? cpu::IndexElement::kBFloat16 : cpu::IndexElement::kFloat32;
}

}  // namespace

CpuIndexer::CpuIndexer(CpuContext& context, const IndexerWeights& weights)
    : context_(context),
      heads_(weights.head_weights.rows),
      dim_(weights.k.rows),
      q_b_(context, weights.q_b, LayerKind::kAttention),
      k_(context, weights.k, LayerKind::kAttention),
      k_norm_(weights.k_norm),
      k_norm_bias_(weights.k_norm_bias),
      head_weights_(context.gemm.pack(read_values(weights.head_weights).data(), weights.head_weights.rows,
                                      weights.head_weights.columns, DType::kFloat32)) {}

std::size_t CpuIndexer::bytes_per_page() const {
  return static_cast<std::size_t>(kPageSize * (key_bytes() + (fp8() ? indexer::kScaleBytes : 0)));
}

std::string CpuIndexer::format() const {
  return "index keys of " + std::to_string(dim_) +
         (fp8() ? " x e4m3" : std::string(" x ") + dtype_name(context_.dtype));
}

void CpuIndexer::allocate_cache(int num_pages) {
  cache_ = allocate_aligned(bytes_per_page() * static_cast<std::size_t>(num_pages));
}

void CpuIndexer::copy_page(int source, int target) {
  const std::size_t bytes = bytes_per_page();
  std::memmove(cache_.data() + static_cast<std::size_t>(target) * bytes,
               cache_.data() + static_cast<std::size_t>(source) * bytes, bytes);
}

// key = LayerNorm(key), its first dimensions turned by the token's angles.
void CpuIndexer::normalise_and_rotate(std::int64_t token, std::byte* key) const {
  std::vector<float> x(static_cast<std::size_t>(dim_));
  cpu::rows::widen(key, context_.dtype, x.data(), dim_);
  double sum = 0, squares = 0;
  for (const float v : x) sum += static_cast<double>(v);
  const double mean = sum / static_cast<double>(dim_);
  for (const float v : x) squares += (static_cast<double>(v) - mean) * (static_cast<double>(v) - mean);
  const double factor =
      1.0 / std::sqrt(squares / static_cast<double>(dim_) + static_cast<double>(kKeyNormEps));
  for (std::size_t i = 0; i < x.size(); ++i) {
    const auto normed = static_cast<float>((static_cast<double>(x[i]) - mean) * factor);
    x[i] = normed * k_norm_[i] + k_norm_bias_[i];
  }
  cpu::rows::narrow(x.data(), key, context_.dtype, dim_);
  const auto pairs = static_cast<std::int64_t>(context_.rope.inv_freq.size());
  cpu::rows::rotate(key, context_.cosines.data() + token * pairs, context_.sines.data() + token * pairs,
                    context_.dtype, pairs);
}

void CpuIndexer::append(const Matrix& h) {
  const Matrix k = context_.activations(context_.buffers.index_k, h.rows, dim_);
  k_.multiply(context_, h, k);
  if (fp8()) {
    context_.for_rows(k.rows, k.columns, [&](std::int64_t t) { normalise_and_rotate(t, k.row(t)); });
    quantise_keys(k);
    return;
  }
  const std::int64_t bytes = key_bytes();
  context_.for_rows(k.rows, k.columns, [&](std::int64_t t) {
    std::byte* key = cache_.data() + context_.step->slots[static_cast<std::size_t>(t)] * bytes;
    std::memcpy(key, k.row(t), static_cast<std::size_t>(bytes));
    normalise_and_rotate(t, key);
  });
}

void CpuIndexer::quantise_keys(const Matrix& k) {
  const auto bytes = static_cast<std::int64_t>(bytes_per_page());
  IndexKeyAppendArgs args;
  args.k = TensorView::contiguous(k.data, k.dtype, {k.rows, dim_});
  args.slot_mapping =
      TensorView::contiguous(const_cast<std::int64_t*>(context_.step->slots.data()), DType::kInt64, {k.rows});
  args.cache = TensorView::contiguous(
      cache_.data(), DType::kUInt8,
      {static_cast<std::int64_t>(cache_.bytes()) / bytes, kPageSize, 1, dim_ + indexer::kScaleBytes});
  args.recipe = kRecipe;
  IndexerOptions options;
  options.num_threads = context_.threads;
  append_index_keys(args, options);
}

CpuIndexer::Queries CpuIndexer::queries(const Matrix& h, const Matrix& q_a) {
  const std::int64_t n = h.rows;
  const auto pairs = static_cast<std::int64_t>(context_.rope.inv_freq.size());
  const Matrix q = context_.activations(context_.buffers.index_q, n, heads_ * dim_);
  q_b_.multiply(context_, q_a, q);
  const Matrix wide = CpuContext::matrix(context_.buffers.index_h, DType::kFloat32, n, h.columns);
  const Matrix weights = CpuContext::matrix(context_.buffers.index_weights, DType::kFloat32, n, heads_);
  context_.for_rows(n, h.columns, [&](std::int64_t t) {
    cpu::rows::widen(h.row(t), context_.dtype, reinterpret_cast<float*>(wide.row(t)), h.columns);
  });
  context_.gemm.run(wide, head_weights_, nullptr, weights,
                    {context_.threads, context_.step->batch_invariant, false});
  const float factor = 1.0f / std::sqrt(static_cast<float>(heads_ * dim_));
  context_.for_rows(n, q.columns, [&](std::int64_t t) {
    for (std::int64_t head = 0; head < heads_; ++head) {
      cpu::rows::rotate(q.row(t) + head * dim_ * context_.element(), context_.cosines.data() + t * pairs,
                        context_.sines.data() + t * pairs, context_.dtype, pairs);
    }
    if (!fp8()) cpu::rows::scale(reinterpret_cast<float*>(weights.row(t)), factor, heads_);
  });
  if (!fp8()) return {q.data, q.stride * context_.element(), weights};
  const Matrix values = CpuContext::matrix(context_.buffers.index_values, DType::kUInt8, n, heads_ * dim_);
  const Matrix scaled = CpuContext::matrix(context_.buffers.index_scaled_weights, DType::kFloat32, n, heads_);
  IndexQueryArgs args;
  args.q = TensorView::contiguous(q.data, q.dtype, {n, heads_, dim_});
  args.weights = TensorView::contiguous(weights.data, DType::kFloat32, {n, heads_});
  args.factor = factor;
  args.recipe = kRecipe;
  args.values = TensorView::contiguous(values.data, DType::kUInt8, {n, heads_, dim_});
  args.scaled_weights = TensorView::contiguous(scaled.data, DType::kFloat32, {n, heads_});
  IndexerOptions options;
  options.num_threads = context_.threads;
  quantise_index_queries(args, options);
  return {values.data, heads_ * dim_, scaled};
}

void CpuIndexer::select(const Matrix& h, const Matrix& q_a) {
  const Step& step = *context_.step;
  const std::int64_t n = h.rows, topk = context_.index_topk();
  const Queries queries = this->queries(h, q_a);
  context_.selection.resize(static_cast<std::size_t>(n * topk));

  indexer::Rows rows;
  rows.heads = static_cast<int>(heads_);
  rows.dim = static_cast<int>(dim_);
  rows.weights_stride = queries.weights.stride;
  rows.keys = cache_.data();
  if (fp8()) rows.scales = rows.keys + kPageSize * dim_;
  rows.key_bytes = key_bytes();
  rows.page_size = kPageSize;
  rows.page_bytes = static_cast<std::int64_t>(bytes_per_page());
  const std::int64_t q_bytes = queries.row_bytes;
  const auto from = [&](std::int64_t token) {
    rows.q = queries.data + token * q_bytes;
    rows.weights = reinterpret_cast<const float*>(queries.weights.row(token));
  };
  if (step.num_absorbed > 0) {
    from(0);
    rows.num_rows = step.num_absorbed;
    rows.rows_per_request = 1;
    rows.q_request_bytes = q_bytes;
    rows.table = step.absorbed_table.data();
    rows.table_stride = step.max_blocks;
    select_rows(rows, 0, step.num_absorbed);
  }
  for (const Chunk& chunk : step.chunks) {
    // The first token that sees more than is chosen.
    const std::int64_t begin = chunk.seq_len - chunk.num_tokens;
    const std::int64_t skip = std::clamp<std::int64_t>(topk - begin, 0, chunk.num_tokens);
    if (skip == chunk.num_tokens) continue;
    from(chunk.first_token + skip);
    rows.num_rows = rows.rows_per_request = chunk.num_tokens - skip;
    rows.q_request_bytes = 0;
    rows.q_row_bytes = q_bytes;
    rows.table = chunk.pages.data();
    rows.table_stride = 0;
    select_rows(rows, chunk.first_token + skip, rows.num_rows);
  }
}

void CpuIndexer::select_rows(const indexer::Rows& given, std::int64_t first, std::int64_t count) {
  const std::int64_t topk = context_.index_topk();
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(count));
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t length = context_.length(first + i);
    lengths[static_cast<std::size_t>(i)] = length > topk ? static_cast<std::int32_t>(length) : 0;
    longest = std::max<std::int64_t>(longest, lengths[static_cast<std::size_t>(i)]);
  }
  if (longest == 0) return;
  indexer::Rows rows = given;
  rows.key_end = lengths.data();
  rows.max_keys = longest;
  const cpu::IndexElement element = element_of(context_.dtype, fp8());
  const std::int64_t piece =
      std::clamp<std::int64_t>(kLogitsBytes / (longest * std::int64_t{sizeof(float)}), 1, count);
  const Matrix logits = CpuContext::matrix(context_.buffers.index_logits, DType::kFloat32, piece, longest);
  const std::size_t bytes = cpu::index_logits_workspace_size(rows, element, context_.threads);
  Buffer& workspace = context_.buffers.index_workspace;
  if (bytes > workspace.bytes()) workspace = allocate_aligned(bytes);
  for (std::int64_t at = 0; at < count; at += piece) {
    const std::int64_t end = std::min(at + piece, count);
    auto* scores = reinterpret_cast<float*>(logits.data);
    cpu::index_logits(rows, element, at, end, {scores, longest, longest, false, false}, workspace.data(),
                      context_.threads);
    context_.for_rows(end - at, longest, [&](std::int64_t i) {
      const std::int64_t row = at + i, length = lengths[static_cast<std::size_t>(row)];
      if (length == 0) return;
      std::int32_t* out = context_.selection.data() + (first + row) * topk;
      cpu::top_k_row(scores + i * longest, length, topk, out);
      const std::int32_t* pages = rows.table + rows.request(row) * rows.table_stride;
      for (std::int64_t j = 0; j < topk; ++j) {
        out[j] = static_cast<std::int32_t>(pages[out[j] / kPageSize] * std::int64_t{kPageSize} +
                                           out[j] % kPageSize);
      }
    });
  }
}

}  // namespace flash_mla::model
