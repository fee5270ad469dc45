// mhc_pre, and mhc_post before it, of bfloat16 in 4 streams.
//
// Tile:      up to 32 tokens for a cluster of 8 blocks. A block has an eighth of the columns of every stream, so that what it makes
//            of the streams, the layer's input, needs no other block's columns: blocks exchange sums alone.
// Threads:   8 warps. Each takes every eighth step of 32 columns of a stream for all tokens of the tile.
// Memory:    29 KB: sums of warps and of blocks, weights.
// Registers: up to 128: two blocks a multiprocessor.
//
// Sums are products on tensor cores. A number of fn is split into three bfloat16 that add up to its 24 bits, so that products are
// exact and sums those of float32. Within a step the columns are in an order of their own, the same on both sides, that makes every
// load 16 bytes. The residual is read from memory once; the layer's input takes it from the L2 cache, where a tile stays.

#include <cooperative_groups.h>

#include "base/cuda/check.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "kernels/mhc/sm90/tiles.h"
#include "kernels/ptx/mma.cuh"

namespace flash_mla::sm90::mhc {
namespace {

namespace cg = cooperative_groups;

constexpr int kBlocks = 8;  // of a cluster
constexpr int kWarp = 32, kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kMixes = kTileStreams * (kTileStreams + 2), kRowTiles = 2, kMixTiles = kMixes / 8;
constexpr int kRows = 16 * kRowTiles;
constexpr int kSums = kMixes + 1;  // and of squares
constexpr int kStep = 32, kVec = 8;
constexpr int kChunk = kWarp * kVec,
              kMaxChunks = kMaxTileWidth / kBlocks / kChunk;  // columns that a warp has at a time
constexpr int kPostWeights = kTileStreams * (kTileStreams + 1);

struct Shared {
  union {
    float warp_sums[kWarps][kRows][kSums];
    float post_weights[kRows][kPostWeights];
  };
  float block_sums[kRows][kSums];
  float pre[kRows][kTileStreams];
  float squares[kRows];  // of the layer's input, this block's columns
  float chunk_squares[kRows][kMaxChunks];
  float scales[3 + kMixes];
};

/// Two neighbours of fn as three pairs of bfloat16, the largest first.
__device__ void split(float first, float second, std::uint32_t (&parts)[3]) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i] = pack<Bf16>(first, second);
    first -= __uint_as_float(parts[i] << 16);
    second -= __uint_as_float(parts[i] & 0xFFFF0000u);
  }
}

/// Sums of one warp.
struct Sums {
  float mixes[kRowTiles][kMixTiles][4] = {};
  float squares[kRowTiles][2] = {};
};

/// Adds 32 columns from `column` on of stream s.
__device__ void add_step(const TileParams& p, std::int64_t first_token, int rows, int s, int column,
                         Sums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int at = column + kVec * t;
  uint4 a[kRowTiles][2];
  float4 b[kMixTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * m + 8 * half + g;
      a[m][half] = make_uint4(0, 0, 0, 0);
      if (row < rows) {
        a[m][half] =
            *reinterpret_cast<const uint4*>(p.residual.at(first_token + row) + s * p.residual.inner + at);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMixTiles; ++j) {
    const float* from = p.fn + (8 * j + g) * p.fn_stride + std::int64_t{s} * p.d + at;
    b[j][0] = __ldg(reinterpret_cast<const float4*>(from));
    b[j][1] = __ldg(reinterpret_cast<const float4*>(from + 4));
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t words[4] = {a[m][half].x, a[m][half].y, a[m][half].z, a[m][half].w};
#pragma unroll
      for (const std::uint32_t word : words) {
        const float low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xFFFF0000u);
        sums.squares[m][half] = fmaf(low, low, fmaf(high, high, sums.squares[m][half]));
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kMixTiles; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      std::uint32_t low[3], high[3];
      split(b[j][k].x, b[j][k].y, low);
      split(b[j][k].z, b[j][k].w, high);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4 &x = a[m][0], &y = a[m][1];
#pragma unroll
        for (int part = 2; part >= 0; --part) {
          if (k == 0) {
            ptx::mma_m16n8k16_bf16(sums.mixes[m][j], x.x, y.x, x.y, y.y, low[part], high[part]);
          } else {
            ptx::mma_m16n8k16_bf16(sums.mixes[m][j], x.z, y.z, x.w, y.w, low[part], high[part]);
          }
        }
      }
    }
  }
}

/// The warp's sums to its place in shared memory.
__device__ void keep_sums(Sums& sums, Shared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* to = shared.warp_sums[warp][16 * m + 8 * half + g];
#pragma unroll
      for (int j = 0; j < kMixTiles; ++j) {
        to[8 * j + 2 * t] = sums.mixes[m][j][2 * half];
        to[8 * j + 2 * t + 1] = sums.mixes[m][j][2 * half + 1];
      }
      float squares = sums.squares[m][half];
      squares += __shfl_xor_sync(~0u, squares, 1);
      squares += __shfl_xor_sync(~0u, squares, 2);
      if (t == 0) to[kMixes] = squares;
    }
  }
}

/// f(row, chunk, column) for every chunk of the block's columns of every row, the warps in turn; the lane's columns begin there.
template <class F>
__device__ void for_chunks(int rows, int begin, int end, const F& f) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int chunks = (end - begin + kChunk - 1) / kChunk;
  for (int item = warp; item < rows * chunks; item += kWarps) {
    const int row = item / chunks, chunk = item - row * chunks;
    f(row, chunk, begin + chunk * kChunk + lane * kVec);
  }
}

/// The layer's input in the block's columns, and its squares.
__device__ void make_inputs(const TileParams& p, std::int64_t first_token, int rows, int begin, int end,
                            Shared& shared) {
  using P = Piece<Bf16, kVec>;
  for_chunks(rows, begin, end, [&](int row, int chunk, int at) {
    float squares = 0;
    if (at < end) {
      const Bf16* residual = p.residual.at(first_token + row) + at;
      P x[kTileStreams];
#pragma unroll
      for (int s = 0; s < kTileStreams; ++s)
        x[s] = *reinterpret_cast<const P*>(residual + s * p.residual.inner);
      float sum[kVec] = {};
#pragma unroll
      for (int s = 0; s < kTileStreams; ++s) {
        const float weight = shared.pre[row][s];
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] = fmaf(weight, as_float(x[s].v[i]), sum[i]);
      }
      const P out = narrow<Bf16, kVec>(sum);
#pragma unroll
      for (int i = 0; i < kVec; ++i) squares = fmaf(as_float(out.v[i]), as_float(out.v[i]), squares);
      *reinterpret_cast<P*>(p.input.at(first_token + row) + at) = out;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    if (threadIdx.x % kWarp == 0) shared.chunk_squares[row][chunk] = squares;
  });
}

/// What make_inputs wrote, normalised; every thread reads what it has written itself.
__device__ void normalise(const TileParams& p, std::int64_t first_token, int rows, int begin, int end,
                          const float* factors) {
  using P = Piece<Bf16, kVec>;
  for_chunks(rows, begin, end, [&](int row, int, int at) {
    if (at >= end) return;
    Bf16* input = p.input.at(first_token + row) + at;
    const P x = *reinterpret_cast<const P*>(input);
    float y[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float weight = p.norm_wide != nullptr ? p.norm_wide[at + i] : as_float(p.norm_narrow[at + i]);
      y[i] = as_float(x.v[i]) * factors[row] * weight;
    }
    *reinterpret_cast<P*>(input) = narrow<Bf16, kVec>(y);
  });
}

/// The block's columns of what is read from memory: all of it under way at once.
template <bool kPosts>
__device__ void prefetch_tile(const TileParams& p, std::int64_t first_token, int rows, int begin, int width) {
  constexpr int kLine = 64;  // elements
  const auto& residual = kPosts ? p.post.residual : p.residual;
  const int lines = (width + kLine - 1) / kLine, streams = kTileStreams + (kPosts ? 1 : 0);
  for (int i = static_cast<int>(threadIdx.x); i < rows * streams * lines; i += kThreads) {
    const int line = i % lines, s = i / lines % streams, row = i / lines / streams;
    const Bf16* from = s < kTileStreams ? residual.at(first_token + row) + s * residual.inner
                                        : p.post.x.at(first_token + row);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + begin + line * kLine));
  }
  // Of few tokens, waiting for fn is what takes time; of many, most find it in the L2 cache.
  if (p.tile == kRows) return;
  const int fn_lines = (width + kLine / 2 - 1) / (kLine / 2);
  for (int i = static_cast<int>(threadIdx.x); i < kMixes * kTileStreams * fn_lines; i += kThreads) {
    const int line = i % fn_lines, s = i / fn_lines % kTileStreams, mix = i / fn_lines / kTileStreams;
    const float* from = p.fn + mix * p.fn_stride + std::int64_t{s} * p.d + begin + line * (kLine / 2);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
}

template <bool kPosts>
__global__ void __launch_bounds__(kThreads, 2) pre_kernel(const __grid_constant__ TileParams p) {
  __shared__ Shared shared;
  __shared__ float factors[kRows];
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const std::int64_t first_token = std::int64_t{blockIdx.x / kBlocks} * p.tile;
  const int rows = static_cast<int>(min(std::int64_t{p.tile}, p.tokens - first_token));
  const int width = p.d / kBlocks, begin = rank * width, end = begin + width;

  prefetch_tile<kPosts>(p, first_token, rows, begin, width);
  load_scales(p.token, kTileStreams, shared.scales);
  if constexpr (kPosts) {
    for (int i = thread; i < rows * kPostWeights; i += kThreads) {
      shared.post_weights[i / kPostWeights][i % kPostWeights] =
          post_weight(p.post, first_token + i / kPostWeights, i % kPostWeights);
    }
    __syncthreads();
    for_chunks(rows, begin, end, [&](int row, int, int at) {
      if (at >= end) return;
      const PostPiece<Bf16, kVec, kTileStreams> piece(p.post, first_token + row, at);
      piece.store(p.post, first_token + row, at, shared.post_weights[row]);
    });
    __syncthreads();
  }

  Sums sums;
  const int steps_of_stream = width / kStep;
#pragma unroll 1
  for (int step = warp; step < kTileStreams * steps_of_stream; step += kWarps) {
    const int s = step / steps_of_stream;
    add_step(p, first_token, rows, s, begin + (step - s * steps_of_stream) * kStep, sums);
  }
  keep_sums(sums, shared);
  __syncthreads();
  for (int i = thread; i < kRows * kSums; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.warp_sums[w][0][i];
    shared.block_sums[0][i] = sum;
  }
  cluster.sync();
  // Every block adds up all, in one order; the first writes what is the token's.
  float* sums_of_all = shared.warp_sums[0][0];
  for (int i = thread; i < rows * kSums; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) sum += *cluster.map_shared_rank(&shared.block_sums[0][i], b);
    sums_of_all[i] = sum;
  }
  __syncthreads();
  // Token r of the tile is written by block r mod 8.
  if (thread < rows) {
    const float* sums_of_token = sums_of_all + thread * kSums;
    weigh_token<kTileStreams>(sums_of_token, sums_of_token[kMixes], first_token + thread, kTileStreams, p.d,
                              p.token, shared.scales, shared.pre[thread], thread % kBlocks == rank);
  }
  __syncthreads();
  make_inputs(p, first_token, rows, begin, end, shared);
  if (p.norm_wide != nullptr || p.norm_narrow != nullptr) {
    __syncthreads();
    if (thread < rows) {
      float squares = 0;
      for (int chunk = 0; chunk * kChunk < width; ++chunk) squares += shared.chunk_squares[thread][chunk];
      shared.squares[thread] = squares;
    }
    cluster.sync();
    if (thread < rows) {
      float squares = 0;
      for (int b = 0; b < kBlocks; ++b) squares += *cluster.map_shared_rank(&shared.squares[thread], b);
      factors[thread] = 1.0f / sqrtf(squares / static_cast<float>(p.d) + p.token.norm_eps);
    }
    __syncthreads();
    normalise(p, first_token, rows, begin, end, factors);
  }
  cluster.sync();  // nobody leaves while others read its memory
}

}  // namespace

void pre_tiles(const TileParams& p, bool posts, cudaStream_t stream) {
  const auto clusters = static_cast<unsigned>((p.tokens + p.tile - 1) / p.tile);
  LaunchConfig config(dim3(clusters * kBlocks), kThreads, 0, stream);
  config.cluster(kBlocks).programmatic();
  check(launch(config, posts ? pre_kernel<true> : pre_kernel<false>, p), "pre_kernel");
}

}  // namespace flash_mla::sm90::mhc
