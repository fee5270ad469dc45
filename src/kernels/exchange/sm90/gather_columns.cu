// Columns of each rank to all others.
//
// Tile:      one row for each CTA at a time.
// Threads:   256, all alike; 16 bytes each where everything is aligned to that, else 4.
// Registers: 40 a thread.
//
// A meeting comes before the first row (nobody uses what was there before) and one behind the last (all columns are there).

#include <string>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "flash_mla/error.h"
#include "kernels/exchange/sm90/gather_columns.h"
#include "kernels/exchange/sm90/meeting.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gather_columns_kernel(const __grid_constant__ GatherColumns p) {
  Meeting meeting(p.peers);
  if (!meeting.meet()) return;
  const std::int64_t width = p.count / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const auto at = [&](int peer) {
      return reinterpret_cast<T*>(static_cast<char*>(p.whole[peer]) + row * p.pitch + p.first);
    };
    const T* const from = at(p.peers.rank);
    for (std::int64_t i = threadIdx.x; i < width; i += kThreads) {
      const T value = __ldcg(from + i);
      for (int peer = 0; peer < p.peers.size; ++peer) {
        if (peer != p.peers.rank) at(peer)[i] = value;
      }
    }
  }
  if (!meeting.meet()) return;
  meeting.end();
}

void require(bool good, const char* name, std::int64_t value, const char* expected) {
  if (!good)
    throw InvalidArgument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

}  // namespace

void gather_columns(const GatherColumns& args, cudaStream_t stream) {
  require(args.peers.size >= 1 && args.peers.size <= kMaxPeers, "size", args.peers.size, "1 to 8");
  require(args.peers.rank >= 0 && args.peers.rank < args.peers.size, "rank", args.peers.rank,
          "0 to size - 1");
  require(args.rows >= 0, "rows", args.rows, ">= 0");
  require(args.pitch % 4 == 0, "pitch", args.pitch, "a multiple of 4");
  require(args.first >= 0 && args.first % 4 == 0, "first", args.first, "a multiple of 4");
  require(args.count >= 0 && args.count % 4 == 0 && args.first + args.count <= args.pitch, "count",
          args.count, "a multiple of 4, up to pitch");
  require(args.ctas > 0, "ctas", args.ctas, "> 0");
  LaunchConfig config(dim3(static_cast<unsigned>(args.ctas)), kThreads, 0, stream);
  check(args.by_16 ? launch(config, gather_columns_kernel<int4>, args)
                   : launch(config, gather_columns_kernel<std::uint32_t>, args),
        "gather_columns");
}

}  // namespace flash_mla::sm90
