#include "kernels/attention/mla_cascade/cpu/mla_cascade.h"

#include <algorithm>
#include <vector>

#include "base/element.h"
#include "base/parallel.h"
#include "kernels/attention/mla_cascade/cpu/products.h"

// A head and kItemRows rows are an item of work: the head's weights are widened to fp32 once for them, rows kBlockRows at a time.
// Every row goes through the same sums whatever its neighbours are.

namespace flash_mla::cpu {
namespace {

constexpr std::int64_t kItemRows = 512, kBlockRows = 32;

std::int64_t padded(std::int64_t n) {
  return (n + ProductKernels::kPad - 1) / ProductKernels::kPad * ProductKernels::kPad;
}

std::byte* address(const TensorView& t, std::int64_t elements) {
  return static_cast<std::byte*>(t.data) + elements * static_cast<std::int64_t>(dtype_size(t.dtype));
}

void widen(const std::byte* from, DType dtype, std::int64_t n, float* to) {
  visit_float_type(dtype, [&](auto element) {
    const auto* x = reinterpret_cast<const decltype(element)*>(from);
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(to_float(x[i]));
  });
  std::fill(to + n, to + padded(n), 0.0f);
}

void narrow(const float* from, DType dtype, std::int64_t n, std::byte* to) {
  visit_float_type(dtype, [&](auto element) {
    auto* x = reinterpret_cast<decltype(element)*>(to);
    for (std::int64_t i = 0; i < n; ++i) x[i] = from_double<decltype(element)>(static_cast<double>(from[i]));
  });
}

void copy(const std::byte* from, DType dtype, std::int64_t n, std::byte* to) {
  std::copy_n(from, n * static_cast<std::int64_t>(dtype_size(dtype)), to);
}

/// What a thread works with: a head's weights, and rows before and after.
struct Scratch {
  std::vector<float> w, x, y;
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }
  static Rows rows(std::vector<float>& v, std::int64_t count, std::int64_t width) {
    const std::int64_t stride = padded(width), size = count * stride;
    if (v.size() < static_cast<std::size_t>(size)) v.resize(static_cast<std::size_t>(size));
    return {v.data(), stride};
  }
  /// Rows [begin, end) of kv_b of a head.
  Rows weights(const TensorView& kv_b, std::int64_t head, std::int64_t begin, std::int64_t end) {
    const std::int64_t rank = kv_b.size(2);
    const Rows to = rows(w, end - begin, rank);
    for (std::int64_t r = begin; r < end; ++r) {
      widen(address(kv_b, head * kv_b.stride(0) + r * kv_b.stride(1)), kv_b.dtype, rank,
            to.data + (r - begin) * to.stride);
    }
    return to;
  }
};

/// f(head, first row, last row + 1) of all items.
template <class F>
void for_items(std::int64_t heads, std::int64_t rows, int threads, const F& f) {
  const std::int64_t blocks = (rows + kItemRows - 1) / kItemRows;
  parallel_for(heads * blocks, threads, [&](std::int64_t item) {
    const std::int64_t first = item % blocks * kItemRows;
    f(item / blocks, first, std::min(first + kItemRows, rows));
  });
}

/// Row `row` of b * s_q and a head, of a tensor of four dimensions.
std::byte* query_row(const TensorView& t, std::int64_t row, std::int64_t head) {
  return address(t, row / t.size(1) * t.stride(0) + row % t.size(1) * t.stride(1) + head * t.stride(2));
}

}  // namespace

void expand_latents(const ExpandArgs& a, int num_threads) {
  const std::int64_t rank = a.kv_b.size(2), v = a.v.size(2), nope = a.kv_b.size(1) - v;
  const std::int64_t rope = a.k.size(2) - nope, page_size = a.k_cache.size(1);
  const DType dtype = a.k.dtype;
  const auto* pages = a.pages.ptr<const std::int32_t>();
  const auto latent = [&](std::int64_t token) {
    return address(a.k_cache,
                   pages[token / page_size] * a.k_cache.stride(0) + token % page_size * a.k_cache.stride(1));
  };
  const std::int64_t rope_offset = rank * static_cast<std::int64_t>(dtype_size(dtype));
  for_items(
      a.kv_b.size(0), a.k.size(0), num_threads, [&](std::int64_t head, std::int64_t begin, std::int64_t end) {
        Scratch& s = Scratch::of_this_thread();
        const Rows w = s.weights(a.kv_b, head, 0, nope + v);
        const Rows x = Scratch::rows(s.x, kBlockRows, rank), y = Scratch::rows(s.y, kBlockRows, nope + v);
        for (std::int64_t first = begin; first < end; first += kBlockRows) {
          const std::int64_t count = std::min(kBlockRows, end - first);
          for (std::int64_t r = 0; r < count; ++r)
            widen(latent(first + r), dtype, rank, x.data + r * x.stride);
          product_kernels().rows(x, w, y, count, nope + v, x.stride);
          for (std::int64_t r = 0; r < count; ++r) {
            const std::int64_t token = first + r;
            const float* from = y.data + r * y.stride;
            std::byte* k = address(a.k, token * a.k.stride(0) + head * a.k.stride(1));
            narrow(from, dtype, nope, k);
            copy(latent(token) + rope_offset, dtype, rope,
                 k + nope * static_cast<std::int64_t>(dtype_size(dtype)));
            narrow(from + nope, dtype, v, address(a.v, token * a.v.stride(0) + head * a.v.stride(1)));
          }
        }
      });
}

void absorb_queries(const TensorView& q, const TensorView& kv_b, const TensorView& absorbed,
                    int num_threads) {
  const std::int64_t rank = kv_b.size(2), rope = absorbed.size(3) - rank, nope = q.size(3) - rope;
  const auto element = static_cast<std::int64_t>(dtype_size(q.dtype));
  for_items(q.size(2), q.size(0) * q.size(1), num_threads,
            [&](std::int64_t head, std::int64_t begin, std::int64_t end) {
              Scratch& s = Scratch::of_this_thread();
              const Rows w = s.weights(kv_b, head, 0, nope);
              const Rows x = Scratch::rows(s.x, kBlockRows, nope), y = Scratch::rows(s.y, kBlockRows, rank);
              for (std::int64_t first = begin; first < end; first += kBlockRows) {
                const std::int64_t count = std::min(kBlockRows, end - first);
                for (std::int64_t r = 0; r < count; ++r) {
                  widen(query_row(q, first + r, head), q.dtype, nope, x.data + r * x.stride);
                }
                product_kernels().columns(x, w, y, count, y.stride, nope);
                for (std::int64_t r = 0; r < count; ++r) {
                  std::byte* to = query_row(absorbed, first + r, head);
                  narrow(y.data + r * y.stride, q.dtype, rank, to);
                  copy(query_row(q, first + r, head) + nope * element, q.dtype, rope, to + rank * element);
                }
              }
            });
}

void project_values(const TensorView& latent, const TensorView& kv_b, const TensorView& out,
                    int num_threads) {
  const std::int64_t rank = kv_b.size(2), v = out.size(3), nope = kv_b.size(1) - v;
  for_items(out.size(2), out.size(0) * out.size(1), num_threads,
            [&](std::int64_t head, std::int64_t begin, std::int64_t end) {
              Scratch& s = Scratch::of_this_thread();
              const Rows w = s.weights(kv_b, head, nope, nope + v);
              const Rows x = Scratch::rows(s.x, kBlockRows, rank), y = Scratch::rows(s.y, kBlockRows, v);
              for (std::int64_t first = begin; first < end; first += kBlockRows) {
                const std::int64_t count = std::min(kBlockRows, end - first);
                for (std::int64_t r = 0; r < count; ++r) {
                  widen(query_row(latent, first + r, head), latent.dtype, rank, x.data + r * x.stride);
                }
                product_kernels().rows(x, w, y, count, v, x.stride);
                for (std::int64_t r = 0; r < count; ++r) {
                  narrow(y.data + r * y.stride, out.dtype, v, query_row(out, first + r, head));
                }
              }
            });
}

}  // namespace flash_mla::cpu
