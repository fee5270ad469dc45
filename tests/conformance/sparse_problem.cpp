#include "sparse_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "base/element.h"
#include "guarded.h"
#include "kv/format.h"

namespace flash_mla::conformance {
namespace {

void store(std::uint8_t* to, DType dtype, float x) {
  visit_float_type(dtype, [&](auto element) {
    const auto value = from_double<decltype(element)>(x);
    std::memcpy(to, &value, sizeof(value));
  });
}

float load(const std::uint8_t* from, DType dtype) {
  return visit_float_type(dtype, [&](auto element) {
    decltype(element) value;
    std::memcpy(&value, from, sizeof(value));
    return static_cast<float>(to_float(value));
  });
}

float draw(std::mt19937& rng) {
  std::normal_distribution<float> normal;
  return std::clamp(normal(rng) / 10, -1.0f, 1.0f);
}

std::int64_t ceil_to(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }

/// Bytes from page to page.
std::int64_t page_stride(const PoolShape& shape, int d_qk) {
  std::int64_t bytes = std::int64_t{shape.page_size} * kv::token_bytes(shape.format, d_qk);
  if (shape.format == KvFormat::kFp8V4) bytes = ceil_to(bytes, 576);
  return ceil_to(bytes, 16) + shape.page_gap;
}

/// (b, s_q, h_q, d) or (b, h_q, s_q), dense, or with the second and third dimension laid out the other way
/// round.
TensorView view_of(void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device,
                   bool permuted) {
  TensorView v = TensorView::contiguous(data, dtype, shape, device);
  if (permuted) {
    const std::int64_t inner = v.strides[2];
    v.strides[1] = inner;
    v.strides[2] = inner * v.shape[1];
  }
  return v;
}

}  // namespace

TestPool::TestPool(const PoolShape& shape, int d_qk, DType rows_dtype, unsigned seed)
    : shape_(shape), d_qk_(d_qk), rows_dtype_(rows_dtype) {
  num_pages = (shape.tokens + shape.page_size - 1) / shape.page_size + 1;
  bytes.assign(static_cast<std::size_t>(num_pages * page_stride(shape, d_qk)), 0xFF);
  std::mt19937 rng(seed);
  // Half of the slots hold tokens, and not the first, so that it can stand in for -1 only by mistake.
  std::vector<std::int32_t> slots(static_cast<std::size_t>(num_pages * shape.page_size - 1));
  std::iota(slots.begin(), slots.end(), 1);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.resize(std::max<std::size_t>(slots.size() / 2, 1));
  live = slots;
  const auto n = static_cast<std::int64_t>(live.size()), latent = std::int64_t{d_qk} - kv::kRopeWidth;
  std::vector<float> latents(static_cast<std::size_t>(n * latent)),
      ropes(static_cast<std::size_t>(n * kv::kRopeWidth));
  for (float& x : latents) x = draw(rng);
  for (float& x : ropes) x = to_float(to_bf16(draw(rng)));
  KvAppendArgs a;
  a.latent = TensorView::contiguous(latents.data(), DType::kFloat32, {n, latent});
  a.rope = TensorView::contiguous(ropes.data(), DType::kFloat32, {n, kv::kRopeWidth});
  a.slot_mapping = TensorView::contiguous(live.data(), DType::kInt32, {n});
  a.cache = host_view();
  a.recipe = shape.recipe;
  append_kv(a, {.num_threads = 1});
  if (shape.format != KvFormat::kFp8V4) return;
  const kv::Pool pool = kv::make_pool(a.cache);
  for (const std::int32_t slot : live) kv::locate(pool, slot).scales[kv::Fp8V4::kScales] = std::byte{0xFF};
}

KvCacheView TestPool::view(void* data, Device device) const {
  KvCacheView v;
  v.format = shape_.format;
  v.scale = shape_.scale;
  const bool fp8 = kv::is_fp8(shape_.format);
  const int width = kv::token_bytes(shape_.format, d_qk_) / (fp8 ? 1 : 2);
  v.data = TensorView::contiguous(data, fp8 ? DType::kUInt8 : rows_dtype_,
                                  {num_pages, shape_.page_size, 1, width}, device);
  v.data.strides[0] = page_stride(shape_, d_qk_) / (fp8 ? 1 : 2);
  return v;
}

SparseProblem::SparseProblem(SparseShape shape) : shape_(std::move(shape)) {
  std::mt19937 rng(shape_.seed);
  const std::size_t element = dtype_size(shape_.dtype);
  q.resize(static_cast<std::size_t>(std::int64_t{shape_.b} * shape_.s_q * shape_.h_q * shape_.d_qk) *
           element);
  for (std::size_t i = 0; i < q.size(); i += element) store(&q[i], shape_.dtype, draw(rng) * 5);
  if (shape_.sink) {
    std::normal_distribution<float> normal;
    for (int h = 0; h < shape_.h_q; ++h) sink.push_back(normal(rng) + 4);
    if (shape_.h_q > 2) {
      sink[1] = std::numeric_limits<float>::infinity();
      sink[2] = -std::numeric_limits<float>::infinity();
    }
  }
  pool = TestPool(shape_.keys, shape_.d_qk, shape_.dtype, shape_.seed * 2 + 1);
  make_lists(shape_.keys, pool, shape_.seed * 3 + 1, indices, lengths);
  if (!shape_.has_extra) return;
  extra_pool = TestPool(shape_.extra, shape_.d_qk, shape_.dtype, shape_.seed * 2 + 2);
  make_lists(shape_.extra, extra_pool, shape_.seed * 3 + 2, extra_indices, extra_lengths);
}

void SparseProblem::make_lists(const PoolShape& shape, const TestPool& tokens, unsigned seed,
                               std::vector<std::int32_t>& lists, std::vector<std::int32_t>& counts) const {
  std::mt19937 rng(seed);
  const auto below = [&](std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(rng); };
  std::vector<std::int32_t> sorted = tokens.live;
  std::sort(sorted.begin(), sorted.end());
  if (shape.lengths) {
    for (int r = 0; r < shape_.b; ++r) {
      const int random = static_cast<int>(below(static_cast<std::size_t>(shape.topk) + 1));
      counts.push_back(r % 4 == 0 ? 0 : r % 4 == 1 ? shape.topk : random);
    }
  }
  for (int r = 0; r < shape_.b; ++r) {
    for (int i = 0; i < shape_.s_q; ++i) {
      std::size_t next = below(sorted.size());
      for (int j = 0; j < shape.topk; ++j) {
        std::int32_t entry = -1;
        if (shape.lengths && j >= counts[static_cast<std::size_t>(r)]) {
          entry = j % 2 == 0 ? 2147480000 : -7;
        } else if (shape_.lists == Lists::kRandom && below(8) != 0) {
          entry = tokens.live[below(tokens.live.size())];
        } else if (shape_.lists == Lists::kDuplicates) {
          entry = sorted[below(std::min<std::size_t>(sorted.size(), 3))];
        } else if (shape_.lists == Lists::kClustered) {
          next = below(16) == 0 ? below(sorted.size()) : (next + 1) % sorted.size();
          entry = sorted[next];
        }
        lists.push_back(entry);
      }
    }
  }
}

SparseDecodeArgs SparseProblem::host_args() const {
  auto& self = const_cast<SparseProblem&>(*this);
  const SparseShape& s = shape_;
  SparseDecodeArgs a;
  a.q = view_of(self.q.data(), s.dtype, {s.b, s.s_q, s.h_q, s.d_qk}, {}, s.strided);
  const auto keys = [&](const PoolShape& shape, const TestPool& tokens, std::vector<std::int32_t>& lists,
                        std::vector<std::int32_t>& counts) {
    SparseKeys k;
    k.cache = tokens.host_view();
    k.indices = TensorView::contiguous(lists.data(), DType::kInt32, {s.b, s.s_q, shape.topk});
    if (shape.lengths) k.topk_length = TensorView::contiguous(counts.data(), DType::kInt32, {s.b});
    return k;
  };
  a.keys = keys(s.keys, pool, self.indices, self.lengths);
  if (s.has_extra) a.extra = keys(s.extra, extra_pool, self.extra_indices, self.extra_lengths);
  if (s.sink) a.attn_sink = TensorView::contiguous(self.sink.data(), DType::kFloat32, {s.h_q});
  return a;
}

SparseResult SparseProblem::run(BackendUnderTest& backend, const SparseDecodeOptions& options) const {
  const SparseShape& s = shape_;
  SparseDecodeArgs a = host_args();
  const auto upload = [&](TensorView& v, const void* from, std::size_t bytes) {
    auto memory = std::make_unique<Guarded>(backend, bytes);
    memory->upload(from);
    v.data = memory->data();
    v.device = backend.device();
    return memory;
  };
  const auto d_q = upload(a.q, q.data(), q.size());
  const auto d_pool = upload(a.keys.cache.data, pool.bytes.data(), pool.bytes.size());
  const auto d_indices = upload(a.keys.indices, indices.data(), indices.size() * 4);
  const auto d_lengths =
      s.keys.lengths ? upload(a.keys.topk_length, lengths.data(), lengths.size() * 4) : nullptr;
  std::unique_ptr<Guarded> d_extra, d_extra_indices, d_extra_lengths;
  if (s.has_extra) {
    d_extra = upload(a.extra.cache.data, extra_pool.bytes.data(), extra_pool.bytes.size());
    d_extra_indices = upload(a.extra.indices, extra_indices.data(), extra_indices.size() * 4);
    if (s.extra.lengths)
      d_extra_lengths = upload(a.extra.topk_length, extra_lengths.data(), extra_lengths.size() * 4);
  }
  const auto d_sink = s.sink ? upload(a.attn_sink, sink.data(), sink.size() * 4) : nullptr;

  const std::vector<std::uint8_t> out_fill(
      static_cast<std::size_t>(std::int64_t{s.b} * s.s_q * s.h_q * 512) * dtype_size(s.dtype), 0xFF);
  const std::vector<std::uint8_t> lse_fill(static_cast<std::size_t>(std::int64_t{s.b} * s.s_q * s.h_q) * 4,
                                           0xFF);
  a.out = view_of(nullptr, s.dtype, {s.b, s.s_q, s.h_q, 512}, {}, s.strided);
  const auto d_out = upload(a.out, out_fill.data(), out_fill.size());
  std::unique_ptr<Guarded> d_lse;
  if (s.lse) {
    a.lse = view_of(nullptr, DType::kFloat32, {s.b, s.h_q, s.s_q}, {}, false);
    d_lse = upload(a.lse, lse_fill.data(), lse_fill.size());
  }
  const std::size_t bytes = sparse_decode_workspace_size(a, options);
  Guarded workspace(backend, bytes);
  const std::vector<std::uint8_t> poison(bytes, 0xFF);
  workspace.upload(poison.data());
  sparse_decode(a, workspace.data(), bytes, options);

  workspace.download();
  SparseResult result;
  result.bits = d_out->download();
  if (d_q->download() != q || d_pool->download() != pool.bytes ||
      (d_extra && d_extra->download() != extra_pool.bytes)) {
    throw std::runtime_error("an input was written");
  }
  for (std::int64_t r = 0; r < s.b; ++r) {
    for (std::int64_t i = 0; i < s.s_q; ++i) {
      for (std::int64_t h = 0; h < s.h_q; ++h) {
        const std::int64_t at = r * a.out.stride(0) + i * a.out.stride(1) + h * a.out.stride(2);
        for (std::int64_t d = 0; d < 512; ++d) {
          result.out.push_back(
              load(&result.bits[static_cast<std::size_t>(at + d) * dtype_size(s.dtype)], s.dtype));
        }
      }
    }
  }
  if (s.lse) {
    const std::vector<std::uint8_t> lse_bits = d_lse->download();
    result.lse.resize(lse_bits.size() / 4);
    std::memcpy(result.lse.data(), lse_bits.data(), lse_bits.size());
    result.bits.insert(result.bits.end(), lse_bits.begin(), lse_bits.end());
  }
  return result;
}

std::string SparseProblem::difference(const SparseResult& got, int rows, int heads,
                                      const SparseDecodeOptions& options) const {
  const SparseShape& s = shape_;
  const int all = s.b * s.s_q, head_step = (s.h_q + heads - 1) / heads;
  const int checked_heads = (s.h_q + head_step - 1) / head_step;
  std::vector<float> out, lse, expected_out, expected_lse;
  for (int n = 0; n < std::min(rows, all); ++n) {
    const int row = static_cast<int>(std::int64_t{n} * all / std::min(rows, all));
    const int r = row / s.s_q, i = row % s.s_q;
    SparseDecodeArgs a = host_args();
    const auto narrow = [&](TensorView& v, bool by_query) {
      if (v.numel() == 0) {
        if (v.defined()) v.shape[0] = v.shape[1] = 1;
        return;
      }
      v.data = static_cast<std::byte*>(v.data) + (r * v.stride(0) + (by_query ? i * v.stride(1) : 0)) *
                                                     static_cast<std::int64_t>(dtype_size(v.dtype));
      v.shape[0] = 1;
      if (by_query) v.shape[1] = 1;
    };
    narrow(a.q, true);
    narrow(a.keys.indices, true);
    narrow(a.extra.indices, true);
    narrow(a.keys.topk_length, false);
    narrow(a.extra.topk_length, false);
    a.q.shape[2] = checked_heads;
    a.q.strides[2] *= head_step;
    std::vector<float> sinks;
    for (int h = 0; h < checked_heads && s.sink; ++h)
      sinks.push_back(sink[static_cast<std::size_t>(h * head_step)]);
    if (s.sink) a.attn_sink = TensorView::contiguous(sinks.data(), DType::kFloat32, {checked_heads});
    std::vector<float> row_out(static_cast<std::size_t>(checked_heads) * 512),
        row_lse(static_cast<std::size_t>(checked_heads));
    a.out = TensorView::contiguous(row_out.data(), DType::kFloat32, {1, 1, checked_heads, 512});
    a.lse = TensorView::contiguous(row_lse.data(), DType::kFloat32, {1, checked_heads, 1});
    reference::sparse_decode(a, options);
    expected_out.insert(expected_out.end(), row_out.begin(), row_out.end());
    for (int h = 0; h < checked_heads; ++h) {
      const auto at = static_cast<std::ptrdiff_t>(out_row(r, i, h * head_step));
      out.insert(out.end(), got.out.begin() + at, got.out.begin() + at + 512);
      if (!s.lse) continue;
      lse.push_back(got.lse[lse_at(r, i, h * head_step)]);
      expected_lse.push_back(row_lse[static_cast<std::size_t>(h)]);
    }
  }
  std::string text = compare("out", out, expected_out, 1e-3, 2.01 / 128, 5e-6);
  return text.empty() ? compare("lse", lse, expected_lse, 1e-6, 8.01 / 65536, 0) : text;
}

SparseProblem SparseProblem::selected(const std::vector<std::size_t>& requests) const {
  SparseProblem p = *this;
  p.shape_.b = static_cast<int>(requests.size());
  const auto select = [&](auto& to, const auto& from) {
    const std::size_t each = from.size() / static_cast<std::size_t>(shape_.b);
    to.clear();
    for (const std::size_t r : requests) {
      to.insert(to.end(), from.begin() + static_cast<std::ptrdiff_t>(r * each),
                from.begin() + static_cast<std::ptrdiff_t>((r + 1) * each));
    }
  };
  select(p.q, q);
  select(p.indices, indices);
  select(p.extra_indices, extra_indices);
  select(p.lengths, lengths);
  select(p.extra_lengths, extra_lengths);
  return p;
}

std::string compare(const char* name, const std::vector<float>& got, const std::vector<float>& expected,
                    double absolute, double relative, double cosine) {
  if (got.size() != expected.size()) return std::string(name) + " has another size";
  double dot = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const double x = got[i], y = expected[i], error = std::abs(x - y);
    if (std::isnan(x) && std::isnan(y)) continue;
    if (std::isinf(y) ? x != y : !(error <= absolute || error <= relative * std::abs(y))) {
      return std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(x) + ", expected " +
             std::to_string(y);
    }
    if (std::isinf(y)) continue;
    dot += x * y;
    norm += x * x + y * y;
  }
  if (cosine > 0 && norm > 0 && got.size() >= 1000 && !(1 - 2 * dot / norm < cosine)) {
    return std::string(name) + " has a cosine difference of " + std::to_string(1 - 2 * dot / norm);
  }
  return "";
}

}  // namespace flash_mla::conformance
