#include "problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>

#include "base/element.h"
#include "flash_mla/reference.h"
#include "guarded.h"

namespace flash_mla::conformance {
namespace {

void store(std::uint8_t* to, DType dtype, float x) {
  visit_float_type(dtype, [&](auto element) {
    using T = decltype(element);
    const T value = from_double<T>(x);
    std::memcpy(to, &value, sizeof(T));
  });
}

float load(const std::uint8_t* from, DType dtype) {
  return visit_float_type(dtype, [&](auto element) {
    using T = decltype(element);
    T value;
    std::memcpy(&value, from, sizeof(T));
    return static_cast<float>(to_float(value));
  });
}

void fill_random(std::vector<std::uint8_t>& v, DType dtype, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < v.size(); i += dtype_size(dtype)) {
    store(&v[i], dtype, std::clamp(normal(rng) / 10, -1.0f, 1.0f));
  }
}

}  // namespace

Problem::Problem(Shape shape) : shape_(std::move(shape)) {
  std::mt19937 rng(shape_.seed);
  const std::size_t element = dtype_size(shape_.dtype);
  std::vector<std::int64_t> pages;
  for (const std::int32_t n : shape_.lengths) {
    pages.push_back((n + shape_.page_size - 1) / shape_.page_size);
    max_blocks = std::max(max_blocks, pages.back());
  }
  max_blocks += 2;
  num_pages = std::accumulate(pages.begin(), pages.end(), std::int64_t{2});
  const std::int64_t row = std::int64_t{shape_.h_kv} * d_qk();
  const std::int64_t page_stride = row * shape_.page_size + shape_.page_gap;
  q.resize(static_cast<std::size_t>(batch() * shape_.s_q * shape_.h_q * d_qk()) * element);
  fill_random(q, shape_.dtype, rng);
  cache.resize(static_cast<std::size_t>(num_pages * page_stride) * element);
  for (std::size_t i = 0; i < cache.size(); i += element) {
    store(&cache[i], shape_.dtype, std::numeric_limits<float>::quiet_NaN());
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(num_pages));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  table.resize(static_cast<std::size_t>(batch() * max_blocks));
  for (std::size_t i = 0; i < table.size(); ++i) table[i] = i % 2 == 0 ? 2147480000 : -1;
  std::size_t next = 0;
  std::vector<std::uint8_t> keys;
  for (std::size_t r = 0; r < pages.size(); ++r) {
    for (std::int64_t j = 0; j < pages[r]; ++j) {
      const std::int32_t page = order[next++];
      table[r * static_cast<std::size_t>(max_blocks) + static_cast<std::size_t>(j)] = page;
      const std::int64_t tokens =
          std::min<std::int64_t>(shape_.lengths[r] - j * shape_.page_size, shape_.page_size);
      keys.resize(static_cast<std::size_t>(tokens * row) * element);
      fill_random(keys, shape_.dtype, rng);
      std::memcpy(&cache[static_cast<std::size_t>(page * page_stride) * element], keys.data(), keys.size());
    }
  }
}

TensorView Problem::view_of(void* data, DType dtype, std::vector<std::int64_t> shape, Device device,
                            bool permuted) const {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.device = device;
  v.rank = static_cast<int>(shape.size());
  // `permuted`: the second dimension is laid out inside the third.
  std::vector<std::size_t> order(shape.size());
  std::iota(order.begin(), order.end(), 0);
  if (permuted) std::swap(order[1], order[2]);
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    v.strides[order[i]] = stride;
    stride *= shape[order[i]];
  }
  std::copy(shape.begin(), shape.end(), v.shape.begin());
  return v;
}

DenseDecodeArgs Problem::host_args(std::vector<std::uint8_t>& out, std::vector<float>& lse) const {
  Problem& self = const_cast<Problem&>(*this);
  const Shape& s = shape_;
  DenseDecodeArgs a;
  a.q = view_of(self.q.data(), s.dtype, {batch(), s.s_q, s.h_q, d_qk()}, {}, s.strided);
  a.k_cache = view_of(self.cache.data(), s.dtype, {num_pages, s.page_size, s.h_kv, d_qk()}, {}, false);
  a.k_cache.strides[0] += s.page_gap;
  a.block_table = TensorView::contiguous(self.table.data(), DType::kInt32, {batch(), max_blocks});
  a.cache_seqlens = TensorView::contiguous(self.shape_.lengths.data(), DType::kInt32, {batch()});
  out.assign(static_cast<std::size_t>(batch() * s.s_q * s.h_q * s.d_v) * dtype_size(s.dtype), 0xFF);
  a.out = view_of(out.data(), s.dtype, {batch(), s.s_q, s.h_q, s.d_v}, {}, s.strided);
  if (s.lse) {
    lse.assign(static_cast<std::size_t>(batch() * s.s_q * s.h_q), std::numeric_limits<float>::quiet_NaN());
    a.lse = view_of(lse.data(), DType::kFloat32, {batch(), s.h_q, s.s_q}, {}, s.strided);
  }
  return a;
}

Problem::QueryParts Problem::query_parts(const TensorView& whole) const {
  const Shape& s = shape_;
  const std::size_t element = dtype_size(s.dtype);
  const std::int64_t heads = s.h_q, rows = batch() * s.s_q, d_v = s.d_v, rope = s.rope;
  QueryParts p;
  p.latent.resize(static_cast<std::size_t>(rows * s.h_q * d_v) * element);
  p.rope.assign(static_cast<std::size_t>(rows * s.h_q * 3 * rope) * element, 0xFF);
  p.rope_offset = static_cast<std::size_t>(2 * rope) * element;
  p.latent_view = TensorView::contiguous(nullptr, s.dtype, {batch(), s.s_q, s.h_q, d_v});
  p.latent_view.strides = {s.s_q * d_v, d_v, rows * d_v, 1};
  p.rope_view = TensorView::contiguous(nullptr, s.dtype, {batch(), s.s_q, s.h_q, rope});
  p.rope_view.strides = {s.s_q * heads * 3 * rope, heads * 3 * rope, 3 * rope, 1};
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < s.s_q; ++i) {
      for (std::int64_t h = 0; h < s.h_q; ++h) {
        const auto at = [&](const TensorView& v) {
          return static_cast<std::size_t>(b * v.stride(0) + i * v.stride(1) + h * v.stride(2)) * element;
        };
        const std::uint8_t* from = q.data() + at(whole);
        const auto latent_bytes = static_cast<std::size_t>(d_v) * element;
        std::memcpy(p.latent.data() + at(p.latent_view), from, latent_bytes);
        std::memcpy(p.rope.data() + p.rope_offset + at(p.rope_view), from + latent_bytes,
                    static_cast<std::size_t>(rope) * element);
      }
    }
  }
  return p;
}

Result Problem::run(BackendUnderTest& backend, const RunOptions& how) const {
  const Shape& s = shape_;
  std::vector<std::uint8_t> out_fill;
  std::vector<float> lse_fill;
  DenseDecodeArgs a = host_args(out_fill, lse_fill);
  const QueryParts parts = s.rope_apart ? query_parts(a.q) : QueryParts{};
  const std::vector<std::uint8_t>& queries = s.rope_apart ? parts.latent : q;
  Guarded d_q(backend, queries.size()), d_rope(backend, parts.rope.size()), d_cache(backend, cache.size()),
      d_table(backend, table.size() * 4), d_lengths(backend, s.lengths.size() * 4),
      d_out(backend, out_fill.size()), d_lse(backend, lse_fill.size() * 4);
  d_q.upload(queries.data());
  d_rope.upload(parts.rope.data());
  d_cache.upload(cache.data());
  d_table.upload(table.data());
  d_lengths.upload(s.lengths.data());
  d_out.upload(out_fill.data());
  d_lse.upload(lse_fill.data());
  const auto place = [&](TensorView& v, const Guarded& g) {
    v.data = g.data();
    v.device = backend.device();
  };
  if (s.rope_apart) {
    a.q = parts.latent_view;
    a.q_rope = parts.rope_view;
    place(a.q_rope, d_rope);
    a.q_rope.data = static_cast<std::byte*>(a.q_rope.data) + parts.rope_offset;
  }
  place(a.q, d_q);
  place(a.k_cache, d_cache);
  place(a.block_table, d_table);
  place(a.cache_seqlens, d_lengths);
  place(a.out, d_out);
  if (s.lse) place(a.lse, d_lse);

  ScheduleOptions plan;
  plan.num_parts = how.num_parts;
  plan.fixed_split_blocks = how.fixed_split_blocks;
  const DecodeSchedule schedule = DecodeSchedule::build(s.lengths, plan);
  DecodeScheduleView view = schedule.view();
  Guarded d_parts(backend, schedule.parts().size_bytes()),
      d_splits(backend, schedule.num_splits().size_bytes());
  d_parts.upload(schedule.parts().data());
  d_splits.upload(schedule.num_splits().data());
  place(view.parts, d_parts);
  place(view.num_splits, d_splits);

  DenseDecodeOptions options;
  options.softmax_scale = s.scale;
  options.causal = s.causal;
  options.num_threads = how.num_threads;
  const std::size_t bytes = dense_decode_workspace_size(a, view, options);
  Guarded workspace(backend, bytes);
  const std::vector<std::uint8_t> poison(bytes, 0xFF);
  workspace.upload(poison.data());
  dense_decode(a, view, workspace.data(), bytes, options);

  workspace.download();
  Result r;
  r.out_bits = d_out.download();
  const std::vector<std::uint8_t> lse_bits = d_lse.download();
  // Inputs are as they were.
  if (d_q.download() != queries || d_rope.download() != parts.rope || d_cache.download() != cache)
    throw std::runtime_error("an input was written");
  for (std::int64_t b = 0; b < batch(); ++b) {
    for (std::int64_t i = 0; i < s.s_q; ++i) {
      for (std::int64_t h = 0; h < s.h_q; ++h) {
        for (std::int64_t d = 0; d < s.d_v; ++d) {
          const std::int64_t at = b * a.out.stride(0) + i * a.out.stride(1) + h * a.out.stride(2) + d;
          r.out.push_back(load(&r.out_bits[static_cast<std::size_t>(at) * dtype_size(s.dtype)], s.dtype));
        }
      }
    }
    for (std::int64_t h = 0; s.lse && h < s.h_q; ++h) {
      for (std::int64_t i = 0; i < s.s_q; ++i) {
        float x;
        std::memcpy(&x,
                    &lse_bits[static_cast<std::size_t>(b * a.lse.stride(0) + h * a.lse.stride(1) +
                                                       i * a.lse.stride(2)) *
                              4],
                    4);
        r.lse.push_back(x);
      }
    }
  }
  return r;
}

Result Problem::reference() const {
  std::vector<std::uint8_t> unused;
  std::vector<float> unused_lse;
  DenseDecodeArgs a = host_args(unused, unused_lse);
  Result r;
  r.out.resize(static_cast<std::size_t>(batch() * shape_.s_q * shape_.h_q * shape_.d_v));
  r.lse.resize(static_cast<std::size_t>(batch() * shape_.s_q * shape_.h_q));
  a.out =
      TensorView::contiguous(r.out.data(), DType::kFloat32, {batch(), shape_.s_q, shape_.h_q, shape_.d_v});
  a.lse = TensorView::contiguous(r.lse.data(), DType::kFloat32, {batch(), shape_.h_q, shape_.s_q});
  DenseDecodeOptions options;
  options.softmax_scale = shape_.scale;
  options.causal = shape_.causal;
  reference::dense_decode(a, options);
  if (!shape_.lse) r.lse.clear();
  return r;
}

Problem Problem::selected(const std::vector<std::size_t>& requests) const {
  Problem p(shape_, Unfilled{});
  p.shape_.lengths.clear();
  p.cache = cache;
  p.num_pages = num_pages;
  p.max_blocks = max_blocks;
  const std::size_t q_bytes = q.size() / std::max<std::size_t>(shape_.lengths.size(), 1);
  const auto width = static_cast<std::size_t>(max_blocks);
  for (const std::size_t r : requests) {
    p.shape_.lengths.push_back(shape_.lengths[r]);
    p.q.insert(p.q.end(), q.begin() + static_cast<std::ptrdiff_t>(r * q_bytes),
               q.begin() + static_cast<std::ptrdiff_t>((r + 1) * q_bytes));
    p.table.insert(p.table.end(), table.begin() + static_cast<std::ptrdiff_t>(r * width),
                   table.begin() + static_cast<std::ptrdiff_t>((r + 1) * width));
  }
  return p;
}

std::string difference(const Result& got, const Result& expected, DType dtype) {
  const bool fp32 = dtype == DType::kFloat32;
  const double absolute = fp32 ? 1e-6 : 8e-4, relative = fp32 ? 1e-5 : 2.01 / 128;
  if (got.out.size() != expected.out.size() || got.lse.size() != expected.lse.size()) return "sizes differ";
  double dot = 0, norm = 0;
  for (std::size_t i = 0; i < got.out.size(); ++i) {
    const double x = got.out[i], y = expected.out[i], error = std::abs(x - y);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (!(error <= absolute || error <= relative * std::abs(y))) {
      return "out[" + std::to_string(i) + "] is " + std::to_string(x) + ", expected " + std::to_string(y);
    }
    dot += x * y;
    norm += x * x + y * y;
  }
  // Over a handful of elements the cosine measures the rounding of the output type and no more.
  if (norm > 0 && got.out.size() >= 1000 && !(1 - 2 * dot / norm < 5e-6))
    return "cosine difference " + std::to_string(1 - 2 * dot / norm);
  for (std::size_t i = 0; i < got.lse.size(); ++i) {
    const double x = got.lse[i], y = expected.lse[i], error = std::abs(x - y);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (std::isinf(y) ? x != y : !(error <= 1e-6 || error <= 8.01 / 65536 * std::abs(y))) {
      return "lse[" + std::to_string(i) + "] is " + std::to_string(x) + ", expected " + std::to_string(y);
    }
  }
  return "";
}

}  // namespace flash_mla::conformance
