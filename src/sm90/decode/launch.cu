// Launches the kernels. Everything a launch depends on has been decided in dense_decode.cpp.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "sm90/decode/combine.cuh"
#include "sm90/decode/kernel.cuh"
#include "sm90/decode/launch.h"
#include "sm90/decode/schedule.cuh"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kSmemBytes = sizeof(DecodeSmem) + 1024;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Args>
void launch(void (*kernel)(Args...), dim3 grid, unsigned threads, std::size_t smem, unsigned cluster,
            void* stream, std::type_identity_t<Args>... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  std::array<cudaLaunchAttribute, 2> attributes{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  config.attrs = attributes.data();
  config.numAttrs = cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

template <bool kBf16, int kCluster>
void launch_decode(const DecodeParams& p, const CUtensorMap& q_map, const CUtensorMap& k_map,
                   const CUtensorMap& k_piece_map, const CUtensorMap& out_map, int h_kv, void* stream) {
  // An attribute of the kernel on the current device. Setting it twice does no harm.
  static std::array<std::atomic<bool>, kMaxDevices> ready{};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (!ready[static_cast<std::size_t>(device)].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(dense_decode_kernel<kBf16, kCluster>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSmemBytes)),
          "cudaFuncSetAttribute");
    ready[static_cast<std::size_t>(device)].store(true, std::memory_order_release);
  }
  const dim3 grid(static_cast<unsigned>(p.blocks.count()), static_cast<unsigned>(h_kv),
                  static_cast<unsigned>(p.num_parts));
  launch(dense_decode_kernel<kBf16, kCluster>, grid, kThreads, kSmemBytes, kCluster, stream, q_map, k_map,
         k_piece_map, out_map, p);
  const bool fixed = p.split_tiles > 0;
  if (p.num_parts == 1 && !fixed) return;
  const auto owners = static_cast<unsigned>(fixed ? p.batch : std::min(p.batch, p.num_parts));
  // The finest shape of at most kBlocks blocks; with fixed split points always the same, since the order of
  // summation must not depend on the rest of the batch.
  constexpr int kBlocks = 512;
  const std::int64_t row_groups_of_all = combine_row_groups(p.blocks, h_kv);
  const auto blocks_of = [&](CombineShape shape) {
    return column_chunks(shape) * row_groups_of_all * owners;
  };
  CombineShape shape = CombineShape::kMedium;
  if (!fixed && blocks_of(CombineShape::kFine) <= kBlocks) shape = CombineShape::kFine;
  if (!fixed && blocks_of(CombineShape::kMedium) > kBlocks) shape = CombineShape::kCoarse;
  const auto kernel = shape == CombineShape::kFine     ? combine_kernel<kBf16, CombineShape::kFine>
                      : shape == CombineShape::kMedium ? combine_kernel<kBf16, CombineShape::kMedium>
                                                       : combine_kernel<kBf16, CombineShape::kCoarse>;
  const dim3 blocks(static_cast<unsigned>(column_chunks(shape)), static_cast<unsigned>(row_groups_of_all),
                    owners);
  launch(kernel, blocks, kCombineWarps * 32, 0, 1, stream, p);
}

}  // namespace

void launch_dense_decode(const DecodeParams& p, const CUtensorMap& q_map, const CUtensorMap& k_map,
                         const CUtensorMap& k_piece_map, const CUtensorMap& out_map, bool bf16, int cluster,
                         int h_kv, void* stream) {
  const auto with_cluster = [&]<bool kBf16>() {
    (cluster == 2 ? launch_decode<kBf16, 2> : launch_decode<kBf16, 1>)(p, q_map, k_map, k_piece_map, out_map,
                                                                       h_kv, stream);
  };
  bf16 ? with_cluster.template operator()<true>() : with_cluster.template operator()<false>();
}

void launch_schedule(const ScheduleParams& p, void* stream) {
  launch(schedule_kernel, dim3(1), kScheduleThreads,
         static_cast<std::size_t>(schedule_words(p.batch, p.num_parts)) * sizeof(std::int32_t), 1, stream, p);
}

}  // namespace flash_mla::sm90
