#include "kernels/attention/dense_decode/reference/dense_decode.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "base/element.h"

namespace flash_mla::reference {
namespace {

// One query row against the keys j < visible of one request and latent head. `score` and `acc` are scratch.
template <class T>
double attend(const DenseDecodeArgs& a, std::int64_t req, const std::vector<double>& q, std::int64_t kv_head,
              std::int64_t visible, double scale, std::vector<double>& score, std::vector<double>& acc) {
  const std::int64_t page_size = a.k_cache.size(1), d_v = a.out.size(3);
  if (visible == 0) {
    std::fill(acc.begin(), acc.end(), 0.0);
    return std::numeric_limits<double>::infinity();
  }
  const auto* pages = a.block_table.ptr<const std::int32_t>() + req * a.block_table.stride(0);
  const auto key = [&](std::int64_t j) {
    return a.k_cache.ptr<const T>() + pages[j / page_size] * a.k_cache.stride(0) +
           (j % page_size) * a.k_cache.stride(1) + kv_head * a.k_cache.stride(2);
  };
  score.resize(static_cast<std::size_t>(visible));
  double highest = -std::numeric_limits<double>::infinity();
  for (std::int64_t j = 0; j < visible; ++j) {
    const T* k = key(j);
    double dot = 0;
    for (std::size_t d = 0; d < q.size(); ++d) dot += q[d] * double{to_float(k[d])};
    score[static_cast<std::size_t>(j)] = dot * scale;
    highest = std::max(highest, dot * scale);
  }
  std::fill(acc.begin(), acc.end(), 0.0);
  double sum = 0;
  for (std::int64_t j = 0; j < visible; ++j) {
    const T* v = key(j);
    const double p = std::exp(score[static_cast<std::size_t>(j)] - highest);
    sum += p;
    for (std::int64_t d = 0; d < d_v; ++d) acc[static_cast<std::size_t>(d)] += p * double{to_float(v[d])};
  }
  for (double& x : acc) x /= sum;
  return highest + std::log(sum);
}

/// A query row, of one part or two.
template <class T>
void read_query(const DenseDecodeArgs& a, std::int64_t r, std::int64_t i, std::int64_t h,
                std::vector<double>& row) {
  row.clear();
  for (const TensorView* part : {&a.q, &a.q_rope}) {
    if (!part->defined()) continue;
    const T* from = part->ptr<const T>() + r * part->stride(0) + i * part->stride(1) + h * part->stride(2);
    for (std::int64_t d = 0; d < part->size(3); ++d) row.push_back(double{to_float(from[d])});
  }
}

template <class T>
void run(const DenseDecodeArgs& a, double scale, bool causal) {
  const std::int64_t b = a.q.size(0), s_q = a.q.size(1), h_q = a.q.size(2), d_v = a.out.size(3);
  const std::int64_t group = h_q / a.k_cache.size(2);
  std::vector<double> score, query, acc(static_cast<std::size_t>(d_v));
  for (std::int64_t r = 0; r < b; ++r) {
    const std::int64_t length = a.cache_seqlens.ptr<const std::int32_t>()[r];
    for (std::int64_t i = 0; i < s_q; ++i) {
      const std::int64_t visible = causal ? std::max<std::int64_t>(length - s_q + i + 1, 0) : length;
      for (std::int64_t h = 0; h < h_q; ++h) {
        read_query<T>(a, r, i, h, query);
        const double lse = attend<T>(a, r, query, h / group, visible, scale, score, acc);
        const std::int64_t o = r * a.out.stride(0) + i * a.out.stride(1) + h * a.out.stride(2);
        visit_float_type(a.out.dtype, [&](auto element) {
          using Out = decltype(element);
          for (std::int64_t d = 0; d < d_v; ++d) {
            a.out.ptr<Out>()[o + d] = from_double<Out>(acc[static_cast<std::size_t>(d)]);
          }
        });
        if (a.lse.defined()) {
          const std::int64_t l = r * a.lse.stride(0) + h * a.lse.stride(1) + i * a.lse.stride(2);
          if (a.lse.dtype == DType::kFloat64) {
            a.lse.ptr<double>()[l] = lse;
          } else {
            a.lse.ptr<float>()[l] = static_cast<float>(lse);
          }
        }
      }
    }
  }
}

}  // namespace

void dense_decode(const DenseDecodeArgs& args, double softmax_scale, bool causal) {
  visit_float_type(args.q.dtype, [&](auto element) { run<decltype(element)>(args, softmax_scale, causal); });
}

}  // namespace flash_mla::reference
