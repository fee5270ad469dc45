#pragma once

#include <cuda_runtime_api.h>

#include "kernels/mhc/sm90/token.cuh"

namespace flash_mla::sm90::mhc {

/// mhc_pre of bfloat16 on tensor cores: of rows of 4 streams, whose width is a multiple of kTileWidth, whose rows begin at
/// multiples of 16 bytes.
inline constexpr int kTileStreams = 4, kTileWidth = 256, kMaxTileWidth = 16384;

struct TileParams {
  Plane<const Bf16> residual;  ///< inner: a stream's stride
  const float* fn;
  std::int64_t fn_stride;
  TokenParams token;
  Plane<Bf16> input;
  const float* norm_wide;  ///< the norm's weights, of either type, or none
  const Bf16* norm_narrow;
  std::int64_t tokens;
  int d;
  int tile;  ///< tokens of a cluster, up to 32
  /// With `posts`: residual is post.out, made first.
  PostParams<Bf16> post;
};

void pre_tiles(const TileParams& p, bool posts, cudaStream_t stream);

}  // namespace flash_mla::sm90::mhc
