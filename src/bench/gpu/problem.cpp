#include "bench/gpu/problem.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>
#include <stdexcept>

#include "bench/gpu/kernels.h"
#include "bench/machine.h"

namespace flash_mla::bench::gpu {
namespace {

constexpr int kDim = 576, kDimV = 512;
constexpr std::int64_t kSparePages = 3;
constexpr std::int32_t kBadPage = 2147480000;
constexpr std::size_t kElement = 2;  // bfloat16 or float16

std::int64_t pages_of(std::int64_t length, int page_size) { return (length + page_size - 1) / page_size; }

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

void require_memory(const Shape& shape, std::size_t bytes) {
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  // Some for the workspace and for the reference.
  if (bytes + bytes / 8 + (std::size_t{1} << 30) > free) {
    throw std::runtime_error(fmt::format("shape {} needs {} of GPU memory, {} are free", shape.name,
                                         format_bytes(static_cast<double>(bytes)),
                                         format_bytes(static_cast<double>(free))));
  }
}

}  // namespace

std::vector<std::int32_t> lengths_of(const Shape& shape, std::uint64_t seed) {
  std::vector<std::int32_t> lengths = draw_lengths(shape.b, shape.s_k, shape.varlen, seed);
  if (!shape.varlen) return lengths;
  const std::int64_t wanted = std::int64_t{shape.b} * shape.s_k;
  const auto sum = [&] { return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0}); };
  const double factor = static_cast<double>(wanted) / static_cast<double>(sum());
  for (std::int32_t& n : lengths) n = std::max(static_cast<std::int32_t>(std::lround(n * factor)), 1);
  // What rounding left over: a token here and there.
  std::int64_t missing = wanted - sum();
  for (std::size_t i = 0; missing != 0; i = (i + 1) % lengths.size()) {
    const int step = missing > 0 ? 1 : -1;
    if (lengths[i] + step < 1) continue;
    lengths[i] += step;
    missing -= step;
  }
  return lengths;
}

Problem::Problem(const Shape& shape, std::vector<std::int32_t> lengths, std::uint64_t seed,
                 const Stream& stream)
    : shape_(shape), lengths_(std::move(lengths)) {
  const std::int64_t rows = std::int64_t{shape.b} * shape.s_q * shape.h_q;
  num_blocks_ = kSparePages;
  for (const std::int32_t n : lengths_) num_blocks_ += pages_of(n, shape.page_size);
  max_blocks_ = pages_of(longest(), shape.page_size);
  const std::int64_t slot = std::int64_t{shape.h_kv} * kDim;  // elements of a token
  const std::int64_t cache = num_blocks_ * shape.page_size * slot;
  require_memory(shape, size(rows * (kDim + kDimV) + cache) * kElement);

  q_ = DeviceArray<std::byte>(size(rows * kDim) * kElement);
  k_cache_ = DeviceArray<std::byte>(size(cache) * kElement);
  out_ = DeviceArray<std::byte>(size(rows * kDimV) * kElement);
  lse_ = DeviceArray<float>(size(rows));
  fill_normal(q_.data(), shape.dtype, rows * kDim, 2 * seed + 1, stream.get());
  fill_normal(k_cache_.data(), shape.dtype, cache, 2 * seed + 2, stream.get());
  stream.wait();
  out_.set(0xFF);
  lse_.set(0xFF);
  cache_seqlens_ = DeviceArray<std::int32_t>::of(lengths_);
  fill_block_table(seed);

  const Device gpu{DeviceType::kCuda, 0};
  const std::int64_t b = shape.b;
  args_.q = TensorView::contiguous(q_.data(), shape.dtype, {b, shape.s_q, shape.h_q, kDim}, gpu);
  args_.k_cache = TensorView::contiguous(k_cache_.data(), shape.dtype,
                                         {num_blocks_, shape.page_size, shape.h_kv, kDim}, gpu);
  args_.block_table = TensorView::contiguous(block_table_.data(), DType::kInt32, {b, max_blocks_}, gpu);
  args_.cache_seqlens = TensorView::contiguous(cache_seqlens_.data(), DType::kInt32, {b}, gpu);
  args_.out = TensorView::contiguous(out_.data(), shape.dtype, {b, shape.s_q, shape.h_q, kDimV}, gpu);
  args_.lse = TensorView::contiguous(lse_.data(), DType::kFloat32, {b, shape.h_q, shape.s_q}, gpu);

  schedule_options_ = cuda_schedule_options(0, shape.s_q, shape.h_q, shape.h_kv, shape.b);
  parts_ = DeviceArray<std::int32_t>(size(schedule_options_.num_parts) * 8);
  num_splits_ = DeviceArray<std::int32_t>(size(b + 1));
  schedule_.parts =
      TensorView::contiguous(parts_.data(), DType::kInt32, {schedule_options_.num_parts, 8}, gpu);
  schedule_.num_splits = TensorView::contiguous(num_splits_.data(), DType::kInt32, {b + 1}, gpu);
  workspace_ = DeviceArray<std::byte>(dense_decode_workspace_size(args_, schedule_));
  workspace_.set(0xFF);
  // The copies and fills above are on another stream than what follows.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

std::int32_t Problem::longest() const { return *std::max_element(lengths_.begin(), lengths_.end()); }

void Problem::fill_block_table(std::uint64_t seed) {
  const auto page_bytes = size(std::int64_t{shape_.page_size} * shape_.h_kv * kDim) * kElement;
  const std::size_t slot_bytes = page_bytes / size(shape_.page_size);
  std::vector<std::int32_t> order(size(num_blocks_));
  std::iota(order.begin(), order.end(), 0);
  Random random(seed);
  for (std::size_t i = order.size() - 1; i > 0; --i)
    std::swap(order[i], order[size(random.integer(0, static_cast<std::int64_t>(i)))]);
  const auto poison = [&](std::int32_t page, std::int64_t from_token) {
    const std::size_t begin = size(from_token) * slot_bytes;
    check(cudaMemset(k_cache_.data() + size(page) * page_bytes + begin, 0xFF, page_bytes - begin),
          "cudaMemset");
  };
  std::vector<std::int32_t> table(size(shape_.b * max_blocks_));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = i % 2 == 0 ? kBadPage : -1;
  std::size_t next = 0;
  for (std::size_t r = 0; r < lengths_.size(); ++r) {
    const std::int64_t pages = pages_of(lengths_[r], shape_.page_size);
    for (std::int64_t i = 0; i < pages; ++i) table[r * size(max_blocks_) + size(i)] = order[next++];
    const std::int64_t in_last = lengths_[r] % shape_.page_size;
    if (in_last != 0) poison(order[next - 1], in_last);
  }
  while (next < order.size()) poison(order[next++], 0);
  block_table_ = DeviceArray<std::int32_t>::of(table);
}

void Problem::decode(const Stream& stream) const {
  DenseDecodeOptions options;
  options.softmax_scale = kSoftmaxScale;
  options.causal = shape_.causal;
  options.stream = stream.get();
  dense_decode(args_, schedule_, workspace_.data(), workspace_.bytes(), options);
}

void Problem::empty_requests(const Stream& stream) {
  check(cudaMemsetAsync(cache_seqlens_.data(), 0, cache_seqlens_.bytes(), stream.get()), "cudaMemsetAsync");
  build_schedule(stream);
  stream.wait();
}

}  // namespace flash_mla::bench::gpu
