#include "case.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <sstream>

#include "reference.h"

namespace flash_mla::gpu_test {

std::string CaseShape::text() const {
  std::ostringstream t;
  t << "b " << lengths.size() << " lengths";
  for (std::size_t i = 0; i < std::min<std::size_t>(lengths.size(), 6); ++i) t << ' ' << lengths[i];
  t << " s_q " << s_q << " h_q " << h_q << " h_kv " << h_kv << " page_size " << page_size << ' '
    << dtype_name(dtype) << (causal ? " causal" : "") << " scale " << scale << " seed " << seed;
  return t.str();
}

Plan::Plan(const DenseDecodeArgs& a, int num_parts, int fixed_split_blocks, PartUnit unit)
    : options(cuda_schedule_options(0, static_cast<int>(a.q.size(1)), static_cast<int>(a.q.size(2)),
                                    static_cast<int>(a.k_cache.size(2)), static_cast<int>(a.q.size(0)))),
      parts(static_cast<std::size_t>(num_parts > 0 ? num_parts : options.num_parts) * 32),
      num_splits(static_cast<std::size_t>(a.q.size(0) + 1) * 4) {
  if (num_parts > 0) options.num_parts = num_parts;
  options.fixed_split_blocks = fixed_split_blocks;
  view.parts = TensorView::contiguous(parts.as<void>(), DType::kInt32, {options.num_parts, 8}, kGpu);
  view.num_splits = TensorView::contiguous(num_splits.as<void>(), DType::kInt32, {a.q.size(0) + 1}, kGpu);
  view.fixed_split_blocks = fixed_split_blocks;
  view.unit = unit;
  parts.poison();
  num_splits.poison();
}

Case::Case(CaseShape shape) : shape_(std::move(shape)) {
  const auto pages_of = [&](std::int32_t n) { return (n + shape_.page_size - 1) / shape_.page_size; };
  std::int64_t num_pages = 2;
  for (const std::int32_t n : shape_.lengths) {
    max_pages_ = std::max<std::int64_t>(max_pages_, pages_of(n));
    num_pages += pages_of(n);
  }
  const std::int64_t used = num_pages;
  num_pages = std::max(num_pages, shape_.min_pages);
  max_pages_ += 2;
  std::vector<std::int32_t> order(static_cast<std::size_t>(used));
  // Pages from both ends of the pool.
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<std::int32_t>(i % 2 == 0 ? num_pages - 1 - static_cast<std::int64_t>(i / 2)
                                                    : static_cast<std::int64_t>(i / 2));
  }
  std::mt19937 rng(shape_.seed);
  std::shuffle(order.begin(), order.end(), rng);
  host_table_.resize(shape_.lengths.size() * static_cast<std::size_t>(max_pages_));
  for (std::size_t i = 0; i < host_table_.size(); ++i) host_table_[i] = i % 2 == 0 ? 2147480000 : -1;
  std::size_t next = 0;
  for (std::size_t r = 0; r < shape_.lengths.size(); ++r) {
    for (int j = 0; j < pages_of(shape_.lengths[r]); ++j) {
      host_table_[r * static_cast<std::size_t>(max_pages_) + static_cast<std::size_t>(j)] = order[next++];
    }
  }
  pool_ = std::make_shared<DeviceMemory>(
      static_cast<std::size_t>(num_pages * shape_.page_size * shape_.h_kv * 576) * 2);
  args_.k_cache = TensorView::contiguous(pool_->as<void>(), shape_.dtype,
                                         {num_pages, shape_.page_size, shape_.h_kv, 576}, kGpu);
  allocate();
  fill_random(args_, max_length_, shape_.seed);
}

void Case::allocate() {
  const auto b = static_cast<std::int64_t>(shape_.lengths.size());
  const auto rows = static_cast<std::size_t>(b * shape_.s_q * shape_.h_q);
  for (const std::int32_t n : shape_.lengths) max_length_ = std::max(max_length_, n);
  q_ = std::make_shared<DeviceMemory>(rows * 576 * 2);
  out_ = std::make_shared<DeviceMemory>(rows * 512 * 2);
  lse_ = std::make_shared<DeviceMemory>(rows * 4);
  table_ = std::make_shared<DeviceMemory>(host_table_.size() * 4);
  lengths_ = std::make_shared<DeviceMemory>(static_cast<std::size_t>(b) * 4);
  table_->upload(host_table_.data(), host_table_.size() * 4);
  lengths_->upload(shape_.lengths.data(), shape_.lengths.size() * 4);
  args_.q = TensorView::contiguous(q_->as<void>(), shape_.dtype, {b, shape_.s_q, shape_.h_q, 576}, kGpu);
  args_.out = TensorView::contiguous(out_->as<void>(), shape_.dtype, {b, shape_.s_q, shape_.h_q, 512}, kGpu);
  args_.lse = TensorView::contiguous(lse_->as<void>(), DType::kFloat32, {b, shape_.h_q, shape_.s_q}, kGpu);
  args_.block_table = TensorView::contiguous(table_->as<void>(), DType::kInt32, {b, max_pages_}, kGpu);
  args_.cache_seqlens = TensorView::contiguous(lengths_->as<void>(), DType::kInt32, {b}, kGpu);
  poison();
}

DenseDecodeOptions Case::options(void* stream) const {
  DenseDecodeOptions o;
  o.softmax_scale = shape_.scale;
  o.causal = shape_.causal;
  o.stream = stream;
  return o;
}

void Case::poison() {
  out_->poison();
  lse_->poison();
}

void Case::run(int num_parts, int fixed_split_blocks, PartUnit unit) {
  Plan plan(args_, num_parts, fixed_split_blocks, unit);
  plan.build(args_);
  const std::size_t bytes = dense_decode_workspace_size(args_, plan.view, options());
  DeviceMemory workspace(bytes);
  workspace.poison();
  poison();
  dense_decode(args_, plan.view, workspace.as<void>(), bytes, options());
}

std::string Case::difference() const {
  const std::size_t rows = lse_->bytes() / 4;
  DeviceMemory scores(rows * static_cast<std::size_t>(max_length_) * 4), out(rows * 512 * 4), lse(rows * 4);
  attention(args_, shape_.scale, shape_.causal && shape_.s_q > 1, max_length_, scores.as<float>(),
            out.as<float>(), lse.as<float>());
  const Difference d = compare(args_, out.as<float>(), lse.as<float>());
  // Over a handful of elements the cosine measures the rounding of the output type and no more.
  const bool aligned = rows < 4 || d.cosine < 5e-6;
  if (d.wrong_out == 0 && d.wrong_lse == 0 && aligned) return "";
  return std::to_string(d.wrong_out) + " elements of out and " + std::to_string(d.wrong_lse) +
         " of lse are wrong, cosine difference " + std::to_string(d.cosine) + ": " + shape_.text();
}

void Case::set_lengths(std::vector<std::int32_t> lengths) {
  shape_.lengths = std::move(lengths);
  lengths_->upload(shape_.lengths.data(), shape_.lengths.size() * 4);
}

Case Case::selected(const std::vector<std::size_t>& which) const {
  Case c;
  c.shape_ = shape_;
  c.shape_.lengths.clear();
  c.max_pages_ = max_pages_;
  c.pool_ = pool_;
  c.args_.k_cache = args_.k_cache;
  const auto width = static_cast<std::size_t>(max_pages_);
  for (const std::size_t r : which) {
    c.shape_.lengths.push_back(shape_.lengths[r]);
    c.host_table_.insert(c.host_table_.end(), host_table_.begin() + static_cast<std::ptrdiff_t>(r * width),
                         host_table_.begin() + static_cast<std::ptrdiff_t>((r + 1) * width));
  }
  c.allocate();
  const std::size_t row = static_cast<std::size_t>(shape_.s_q * shape_.h_q) * 576 * 2;
  for (std::size_t i = 0; i < which.size(); ++i) {
    check(cudaMemcpy(c.q_->as<std::uint8_t>() + i * row, q_->as<std::uint8_t>() + which[i] * row, row,
                     cudaMemcpyDeviceToDevice),
          "cudaMemcpy");
  }
  return c;
}

}  // namespace flash_mla::gpu_test
