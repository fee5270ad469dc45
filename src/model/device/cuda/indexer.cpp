#include "model/device/cuda/indexer.h"

#include <cmath>

#include "base/cuda/check.h"
#include "base/page_size.h"
#include "flash_mla/indexer.h"
#include "kernels/attention/indexer/rows.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/rows/sm90/index_rows.h"

namespace flash_mla::model {
namespace {

constexpr float kKeyNormEps = 1e-6f;
constexpr Fp8Recipe kRecipe = Fp8Recipe::kIndexerPow2;

sm90::IndexRotation rotation_of(const CudaContext& context) {
  return {context.rotations.cosines, context.rotations.sines, context.rotations.pairs};
}

}  // namespace

CudaIndexer::CudaIndexer(CudaContext& context, const IndexerWeights& weights)
    : context_(context),
      heads_(weights.head_weights.rows),
      dim_(weights.k.rows),
      q_b_(context, weights.q_b),
      k_(context, weights.k),
      k_norm_(context.weights.vector(weights.k_norm)),
      k_norm_bias_(context.weights.vector(weights.k_norm_bias)),
      head_weights_(context.weights.float32_matrix(weights.head_weights)) {}

std::size_t CudaIndexer::bytes_per_page() const {
  return static_cast<std::size_t>(kPageSize * (dim_ + indexer::kScaleBytes));
}

void CudaIndexer::allocate_cache(int num_pages) {
  cache_ = context_.pool->allocate(bytes_per_page() * static_cast<std::size_t>(num_pages));
}

void CudaIndexer::clear_cache() const {
  check(cudaMemsetAsync(cache_.data(), 0, cache_.bytes(), context_.stream), "cudaMemsetAsync");
}

void CudaIndexer::copy_page(int source, int target) const {
  const std::size_t bytes = bytes_per_page();
  check(cudaMemcpyAsync(cache_.data() + static_cast<std::size_t>(target) * bytes,
                        cache_.data() + static_cast<std::size_t>(source) * bytes, bytes,
                        cudaMemcpyDeviceToDevice, context_.stream),
        "cudaMemcpyAsync");
}

TensorView CudaIndexer::cache() const {
  const auto pages = static_cast<std::int64_t>(cache_.bytes() / bytes_per_page());
  return on_device(cache_.data(), DType::kUInt8, {pages, kPageSize, 1, dim_ + indexer::kScaleBytes});
}

void CudaIndexer::append(const Matrix& h) const {
  const Matrix k = context_.activations(context_.buffers.index_k, h.rows, dim_);
  k_.multiply(context_, h, k);
  sm90::norm_and_rotate_index_keys(k, floats(k_norm_), floats(k_norm_bias_), kKeyNormEps,
                                   rotation_of(context_), context_.stream);
  IndexKeyAppendArgs args;
  args.k = on_device(k.data, k.dtype, {k.rows, dim_});
  args.slot_mapping = on_device(context_.data.slots, DType::kInt64, {k.rows});
  args.cache = cache();
  args.recipe = kRecipe;
  IndexerOptions options;
  options.stream = context_.stream;
  append_index_keys(args, options);
}

CudaIndexer::Queries CudaIndexer::queries(const Matrix& h, const Matrix& q_a) const {
  auto& buffers = context_.buffers;
  const std::int64_t n = h.rows;
  const Matrix q = context_.activations(buffers.index_q, n, heads_ * dim_);
  q_b_.multiply(context_, q_a, q);
  sm90::rotate_index_queries(q, static_cast<int>(dim_), rotation_of(context_), context_.stream);

  const Matrix weights = context_.activations(buffers.index_weights, n, heads_, DType::kFloat32);
  sm90::SkinnyGemm product;
  product.x = h.data;
  product.x_stride = h.stride;
  product.weight = head_weights_.data();
  product.out = weights.data;
  product.out_stride = weights.stride;
  product.m = n;
  product.n = heads_;
  product.k = h.columns;
  product.out_fp32 = product.weight_fp32 = true;
  product.batch_invariant = context_.step->batch_invariant;
  product.programmatic_launch = true;
  check(sm90::skinny_gemm(product, context_.stream), "skinny_gemm");

  const Matrix values = context_.activations(buffers.index_values, n, heads_ * dim_, DType::kUInt8);
  const Matrix scaled = context_.activations(buffers.index_scaled_weights, n, heads_, DType::kFloat32);
  IndexQueryArgs args;
  args.q = on_device(q.data, q.dtype, {n, heads_, dim_});
  args.weights = on_device(weights.data, DType::kFloat32, {n, heads_});
  args.factor = 1.0f / std::sqrt(static_cast<float>(heads_ * dim_));
  args.recipe = kRecipe;
  args.values = on_device(values.data, DType::kUInt8, {n, heads_, dim_});
  args.scaled_weights = on_device(scaled.data, DType::kFloat32, {n, heads_});
  IndexerOptions options;
  options.stream = context_.stream;
  quantise_index_queries(args, options);
  return {values, scaled};
}

void CudaIndexer::select(const Matrix& h, const Matrix& q_a) const {
  const StepData& data = context_.data;
  const Queries queries = this->queries(h, q_a);
  context_.activations(context_.buffers.selection, h.rows, context_.index_topk(), DType::kInt32);
  const std::int64_t absorbed = context_.step->num_absorbed;
  if (absorbed > 0) select_rows(queries, {0, absorbed, 1, data.lens, data.table, data.max_blocks});
  for (const StepData::Listed& part : data.listed) {
    select_rows(queries, {part.first_token, 1, part.num_tokens, part.seq_len, part.pages, part.num_pages});
  }
}

void CudaIndexer::select_rows(const Queries& queries, const Rows& rows) const {
  const std::int64_t n = rows.requests * rows.tokens, topk = context_.index_topk();
  PagedMqaLogitsArgs args;
  args.q = on_device(queries.values.row(rows.first_token), DType::kUInt8,
                     {rows.requests, rows.tokens, heads_, dim_});
  args.weights = on_device(queries.weights.row(rows.first_token), DType::kFloat32, {n, heads_});
  args.cache = cache();
  args.context_lens = on_device(rows.lengths, DType::kInt32, {rows.requests});
  args.block_table = on_device(rows.table, DType::kInt32, {rows.requests, rows.width});
  // The latent cache has the same pages: what is chosen are its slots.
  TopKOutput output;
  output.block_table = args.block_table;
  output.page_size = kPageSize;
  auto* selection = reinterpret_cast<std::int32_t*>(context_.buffers.selection.data());
  const TensorView indices = on_device(selection + rows.first_token * topk, DType::kInt32, {n, topk});
  MqaTopKOptions options;
  options.indexer.stream = context_.stream;
  options.logits_bytes = kIndexLogitsBytes;
  const std::size_t bytes = paged_mqa_top_k_workspace_size(args, output, indices, options);
  context_.grow(context_.buffers.index_workspace, bytes);
  paged_mqa_top_k(args, output, indices, context_.buffers.index_workspace.data(), bytes, options);
}

}  // namespace flash_mla::model
