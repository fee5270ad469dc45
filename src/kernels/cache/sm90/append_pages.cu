// Keys and values into pages on Hopper, and the numbers that go with it.
//
// Tile:      up to 4 pieces of 16 bytes a lane, so a part of a token of 2 KB, for each warp; keys and values are different blocks.
//            Pieces are narrower where heads, strides or addresses ask for it.
// Threads:   8 warps.
// Memory:    none that is shared.
// Registers: the part, 16, and addresses. It is asked for before the token's place is known.

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/cache/pages.h"

namespace flash_mla::sm90 {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kHeld = 4;  // pieces of a lane

/// A vector of int32 or int64.
struct Integers {
  void* data;
  std::int64_t stride;
  bool wide;

  __device__ std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(data)[i * stride]
                : static_cast<const std::int32_t*>(data)[i * stride];
  }
  __device__ void put(std::int64_t i, std::int64_t x) const {
    if (wide) {
      static_cast<std::int64_t*>(data)[i * stride] = x;
    } else {
      static_cast<std::int32_t*>(data)[i * stride] = static_cast<std::int32_t>(x);
    }
  }
};
Integers integers(const TensorView& t) { return {t.data, t.stride(0), t.dtype == DType::kInt64}; }

/// Rows and the pool they go to; strides in pieces.
template <class P>
struct Copy {
  const P* rows;
  std::int64_t row, row_head;
  P* pool;
  std::int64_t page, slot, pool_head;
  std::int64_t pieces;             ///< of a token
  unsigned pieces_of_head, parts;  ///< parts: of a token, kWarp * kHeld pieces each
};

template <class P>
struct AppendParams {
  Copy<P> copies[2];
  Integers sequences, positions, page_indptr, page_indices;
  std::int64_t tokens, batch, num_pages, page_size, num_indices;
};

/// Where the token lies in the pool of `copy`, in pieces; -1 of one that is written nowhere.
template <class P>
__device__ std::int64_t place_of(const AppendParams<P>& p, const Copy<P>& copy, std::int64_t token) {
  const std::int64_t sequence = p.sequences[token], position = p.positions[token];
  if (sequence < 0 || sequence >= p.batch || position < 0) return -1;
  const std::int64_t first = p.page_indptr[sequence], end = p.page_indptr[sequence + 1];
  // Divisions of 64 bits are slow.
  const bool narrow = ((position | p.page_size) >> 32) == 0;
  const std::int64_t page_of =
      narrow ? static_cast<unsigned>(position) / static_cast<unsigned>(p.page_size) : position / p.page_size;
  const std::int64_t at = first + page_of;
  if (first < 0 || at >= end || at >= p.num_indices) return -1;
  const std::int64_t page = p.page_indices[at];
  if (page < 0 || page >= p.num_pages) return -1;
  return page * copy.page + (position - page_of * p.page_size) * copy.slot;
}

template <class P>
__global__ void __launch_bounds__(kThreads) append_pages_kernel(const __grid_constant__ AppendParams<P> p) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const Copy<P>& copy = p.copies[blockIdx.y];
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  const std::int64_t token = item / copy.parts;
  if (token >= p.tokens) return;
  const std::int64_t first = (item - token * copy.parts) * (kWarp * kHeld) + threadIdx.x % kWarp;
  P held[kHeld];
  std::int64_t to[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const std::int64_t piece = first + i * kWarp;
    if (piece >= copy.pieces) continue;
    const unsigned head = static_cast<unsigned>(piece) / copy.pieces_of_head;
    const unsigned in_head = static_cast<unsigned>(piece) - head * copy.pieces_of_head;
    held[i] = copy.rows[token * copy.row + head * copy.row_head + in_head];
    to[i] = head * copy.pool_head + in_head;
  }
  const std::int64_t place = place_of(p, copy, token);
  if (place < 0) return;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * kWarp < copy.pieces) copy.pool[place + to[i]] = held[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    batch_positions_kernel(Integers indptr, Integers seqlens, std::int64_t batch, Integers batch_indices,
                           Integers positions, std::int64_t tokens) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t token = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (token >= tokens) return;
  // The last sequence that begins at the token or before.
  std::int64_t low = -1, high = batch;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (indptr[middle] <= token ? low : high) = middle;
  }
  const bool known = low >= 0 && token < indptr[low + 1];
  batch_indices.put(token, known ? low : -1);
  positions.put(token, known ? seqlens[low] - (indptr[low + 1] - token) : -1);
}

__global__ void __launch_bounds__(kThreads)
    paged_seqlens_kernel(Integers indptr, Integers last, std::int64_t page_size, Integers seqlens,
                         std::int64_t batch) {
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= batch) return;
  const std::int64_t pages = indptr[i + 1] - indptr[i];
  seqlens.put(i, pages == 0 ? 0 : (pages - 1) * page_size + last[i]);
}

/// Bits that an address, a stride or a length of `t` has in bytes.
std::int64_t bits_of(const TensorView& t) {
  const auto element = static_cast<std::int64_t>(dtype_size(t.dtype));
  auto all =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(t.data)) | t.size(t.rank - 1) * element;
  for (int d = 0; d + 1 < t.rank; ++d) {
    if (t.size(d) > 1) all |= t.stride(d) * element;
  }
  return all;
}

template <class P>
Copy<P> copy_of(const TensorView& rows, const TensorView& pool) {
  const auto element = static_cast<std::int64_t>(dtype_size(rows.dtype));
  const auto pieces = [&](std::int64_t elements) {
    return elements * element / static_cast<std::int64_t>(sizeof(P));
  };
  Copy<P> c{};
  c.rows = rows.ptr<const P>();
  c.row = pieces(rows.stride(0));
  c.row_head = pieces(rows.stride(1));
  c.pool = pool.ptr<P>();
  c.page = pieces(pool.stride(0));
  c.slot = pieces(pool.stride(1));
  c.pool_head = pieces(pool.stride(2));
  c.pieces = pieces(rows.size(1) * rows.size(2));
  c.pieces_of_head = static_cast<unsigned>(pieces(rows.size(2)));
  c.parts = static_cast<unsigned>((c.pieces + kWarp * kHeld - 1) / (kWarp * kHeld));
  return c;
}

template <class P>
void launch_append(const PageAppendArgs& a, cudaStream_t stream) {
  AppendParams<P> p{};
  p.copies[0] = copy_of<P>(a.key, a.k_cache);
  if (a.value.defined()) p.copies[1] = copy_of<P>(a.value, a.v_cache);
  p.sequences = integers(a.batch_indices);
  p.positions = integers(a.positions);
  p.page_indptr = integers(a.page_indptr);
  p.page_indices = integers(a.page_indices);
  p.tokens = a.key.size(0);
  p.batch = a.page_indptr.size(0) - 1;
  p.num_pages = a.k_cache.size(0);
  p.page_size = a.k_cache.size(1);
  p.num_indices = a.page_indices.size(0);
  const std::int64_t parts = std::max(p.copies[0].parts, p.copies[1].parts);
  const dim3 grid(static_cast<unsigned>((p.tokens * parts + kWarps - 1) / kWarps), a.value.defined() ? 2 : 1);
  check(launch(LaunchConfig(grid, kThreads, 0, stream).programmatic(), append_pages_kernel<P>, p),
        "append_pages_kernel");
}

/// A device that this backend runs on, and so few warps that a grid takes them.
void check_sizes(const TensorView& t, const char* name, std::int64_t rows, std::int64_t pieces) {
  require_device(t.device.index);
  if (pieces <= INT32_MAX && rows <= INT32_MAX / std::max<std::int64_t>(pieces / (kWarp * kHeld) + 1, 1))
    return;
  throw Unsupported(std::string(name) + " is " + t.describe() + "; the sm90 backend takes less");
}

unsigned blocks_for(std::int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

}  // namespace

void append_pages(const PageAppendArgs& a, void* stream) {
  std::int64_t all = bits_of(a.key) | bits_of(a.k_cache) | 16;
  if (a.value.defined()) all |= bits_of(a.value) | bits_of(a.v_cache);
  const std::int64_t piece = all & -all;
  const auto count = [&](const TensorView& t) {
    return t.size(1) * t.size(2) * static_cast<std::int64_t>(dtype_size(t.dtype)) / piece;
  };
  check_sizes(a.key, "key", a.key.size(0), count(a.key));
  if (a.value.defined()) check_sizes(a.value, "value", a.key.size(0), count(a.value));
  if (a.key.size(0) == 0 || a.page_indptr.size(0) < 1) return;
  const DeviceGuard guard(a.key.device.index);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (piece == 16) return launch_append<uint4>(a, queue);
  if (piece == 8) return launch_append<std::uint64_t>(a, queue);
  if (piece == 4) return launch_append<std::uint32_t>(a, queue);
  if (piece == 2) return launch_append<std::uint16_t>(a, queue);
  launch_append<std::uint8_t>(a, queue);
}

void batch_positions(const TensorView& indptr, const TensorView& seqlens, const TensorView& batch_indices,
                     const TensorView& positions, void* stream) {
  check_sizes(batch_indices, "batch_indices", batch_indices.size(0), 1);
  const DeviceGuard guard(indptr.device.index);
  const LaunchConfig config(dim3(blocks_for(batch_indices.size(0))), kThreads, 0,
                            static_cast<cudaStream_t>(stream));
  check(launch(config, batch_positions_kernel, integers(indptr), integers(seqlens), seqlens.size(0),
               integers(batch_indices), integers(positions), batch_indices.size(0)),
        "batch_positions_kernel");
}

void paged_seqlens(const TensorView& page_indptr, const TensorView& last_page_len, std::int64_t page_size,
                   const TensorView& seqlens, void* stream) {
  check_sizes(seqlens, "seqlens", seqlens.size(0), 1);
  const DeviceGuard guard(page_indptr.device.index);
  const LaunchConfig config(dim3(blocks_for(seqlens.size(0))), kThreads, 0,
                            static_cast<cudaStream_t>(stream));
  check(launch(config, paged_seqlens_kernel, integers(page_indptr), integers(last_page_len), page_size,
               integers(seqlens), seqlens.size(0)),
        "paged_seqlens_kernel");
}

}  // namespace flash_mla::sm90
