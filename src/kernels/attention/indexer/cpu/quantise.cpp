// Keys into the cache and queries to e4m3: rotation and scale of each row.

#include "kernels/quant/cpu/quantise.h"

#include <array>
#include <cmath>
#include <cstring>

#include "base/element.h"
#include "base/fp8.h"
#include "kernels/attention/indexer/cpu/indexer.h"
#include "kernels/cache/cpu/tokens.h"

namespace flash_mla::cpu {
namespace {

using IndexRow = std::array<float, kMaxIndexDim>;

/// The Hadamard transform in its natural order, in place: n is a power of two. Each sum is of two numbers, in
/// the order that every backend has.
void hadamard(float* x, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = 0; i < n; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
}

/// A row of `x`, rotated where that is wanted and rounded to its dtype.
template <class T>
void read_row(const T* from, int dim, bool rotate, IndexRow& row) {
  for (int i = 0; i < dim; ++i) row[static_cast<std::size_t>(i)] = static_cast<float>(to_float(from[i]));
  if (!rotate) return;
  hadamard(row.data(), dim);
  const float factor = dim == 128 ? 0x1.6a09e6p-4f : 0.125f;  // dim ** -0.5
  for (int i = 0; i < dim; ++i) {
    float& x = row[static_cast<std::size_t>(i)];
    x = static_cast<float>(to_float(from_double<T>(static_cast<double>(x * factor))));
  }
}

}  // namespace

void append_index_keys(const IndexKeyAppendArgs& args, int num_threads) {
  const auto dim = static_cast<int>(args.k.size(1));
  const std::int64_t page_size = args.cache.size(1);
  visit_float_type(args.k.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_token(args.k.size(0), num_threads, [&](std::int64_t i) {
      const std::int64_t slot = integer(args.slot_mapping, i);
      if (slot < 0) return;
      IndexRow row;
      read_row(args.k.ptr<const T>() + i * args.k.stride(0), dim, args.rotate, row);
      std::byte* page = args.cache.ptr<std::byte>() + slot / page_size * args.cache.stride(0);
      const std::int64_t offset = slot % page_size;
      const float scale =
          quantise_tile(row.data(), dim, args.recipe, reinterpret_cast<E4m3*>(page + offset * dim));
      std::memcpy(page + page_size * dim + offset * indexer::kScaleBytes, &scale, sizeof(scale));
    });
  });
}

void quantise_index_queries(const IndexQueryArgs& args, int num_threads) {
  const std::int64_t heads = args.q.size(1);
  const auto dim = static_cast<int>(args.q.size(2));
  visit_float_type(args.q.dtype, [&](auto element) {
    using T = decltype(element);
    for_each_token(args.q.size(0), num_threads, [&](std::int64_t i) {
      const T* from = args.q.ptr<const T>() + i * args.q.stride(0);
      auto* to = args.values.ptr<E4m3>() + i * args.values.stride(0);
      const float* weights = args.weights.ptr<const float>() + i * args.weights.stride(0);
      float* scaled = args.scaled_weights.ptr<float>() + i * args.scaled_weights.stride(0);
      for (std::int64_t h = 0; h < heads; ++h) {
        IndexRow row;
        read_row(from + h * dim, dim, args.rotate, row);
        const float scale = quantise_tile(row.data(), dim, args.recipe, to + h * dim);
        scaled[h] = weights[h] * args.factor * scale;
      }
    });
  });
}

}  // namespace flash_mla::cpu
