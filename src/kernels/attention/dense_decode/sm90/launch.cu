// Launches the kernels. Everything a launch depends on has been decided in dense_decode.cpp and plan.h.

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/cuda/check.h"
#include "base/cuda/launch.h"
#include "base/cuda/shared_memory.h"
#include "kernels/attention/dense_decode/sm90/combine.cuh"
#include "kernels/attention/dense_decode/sm90/kernel.cuh"
#include "kernels/attention/dense_decode/sm90/kernel_facts.h"
#include "kernels/attention/dense_decode/sm90/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr std::size_t kSmemBytes = sizeof(DecodeSmem<ptx::Element<true>>) + 1024;

dim3 dim3_of(const Grid& g) {
  return {static_cast<unsigned>(g.x), static_cast<unsigned>(g.y), static_cast<unsigned>(g.z)};
}

/// f.operator()<i>(), i the index of `shape`.
template <class F>
void with_shape(CombineShape shape, F&& f) {
  const auto one_of = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    return ((shape == kCombineShapes[kIndices] && (f.template operator()<kIndices>(), true)) || ...);
  };
  if (!one_of(std::make_integer_sequence<int, static_cast<int>(kCombineShapes.size())>{})) {
    throw std::logic_error("a combine shape that is not one of kCombineShapes");
  }
}

template <int kIndex>
std::size_t combine_smem(const DecodePlan& plan) {
  return std::max(sizeof(CombineSmem<kIndex>), plan.combine_smem);
}

/// Blocks are given so much shared memory that no multiprocessor takes more of them than its share: the first
/// ones to be free would take up to four each, and read at a fourth of the rate.
template <bool kBf16, bool kLists = false>
void launch_combine(const DecodeParams& p, const ListsOfCombine& lists, const DecodePlan& plan,
                    cudaStream_t stream) {
  with_shape(plan.combine, [&]<int kIndex>() {
    check(allow_shared_memory<combine_kernel<kBf16, kIndex, kLists>>(kMaxSmem), "cudaFuncSetAttribute");
    LaunchConfig config(dim3_of(plan.combine_grid), kCombineWarps * 32, combine_smem<kIndex>(plan), stream);
    check(launch(config.programmatic(), combine_kernel<kBf16, kIndex, kLists>, p, lists), "combine_kernel");
  });
}

template <bool kBf16, int kCluster>
void launch_decode(const DecodeParams& p, const DecodeMaps& maps, const DecodePlan& plan,
                   cudaStream_t stream) {
  check(allow_shared_memory<dense_decode_kernel<kBf16, kCluster>>(kSmemBytes), "cudaFuncSetAttribute");
  LaunchConfig config(dim3_of(plan.grid), kThreads, kSmemBytes, stream);
  check(launch(config.cluster(kCluster).programmatic(), dense_decode_kernel<kBf16, kCluster>, maps.q,
               maps.q_rope, maps.k, maps.k_piece, maps.out, p, maps.q_rope_chunk),
        "dense_decode_kernel");
  if (plan.combines) launch_combine<kBf16>(p, {}, plan, stream);
}

template <class F>
KernelFacts facts_of(F* kernel, int threads, std::size_t smem) {
  KernelFacts facts{threads, smem, 0, 0};
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess) {
    facts.registers = attributes.numRegs;
    facts.spill_bytes = attributes.localSizeBytes;
  } else {
    cudaGetLastError();  // no GPU: what the compiler fixed is all that is known
  }
  return facts;
}

}  // namespace

void launch_dense_decode(const DecodeParams& p, const DecodeMaps& maps, bool bf16, const DecodePlan& plan,
                         void* stream) {
  const auto with_cluster = [&]<bool kBf16>() {
    (plan.cluster == 2 ? launch_decode<kBf16, 2>
                       : launch_decode<kBf16, 1>)(p, maps, plan, static_cast<cudaStream_t>(stream));
  };
  bf16 ? with_cluster.template operator()<true>() : with_cluster.template operator()<false>();
}

void launch_combine_parts(const DecodeParams& p, bool bf16, const DecodePlan& plan, void* stream) {
  (bf16 ? launch_combine<true> : launch_combine<false>)(p, {}, plan, static_cast<cudaStream_t>(stream));
}

void launch_combine_lists(const DecodeParams& p, const ListsOfCombine& lists, bool bf16,
                          const DecodePlan& plan, void* stream) {
  const auto combine = bf16 ? launch_combine<true, true> : launch_combine<false, true>;
  combine(p, lists, plan, static_cast<cudaStream_t>(stream));
}

KernelFacts decode_kernel_facts(const DecodePlan& plan, bool bf16) {
  const auto kernel =
      bf16 ? (plan.cluster == 2 ? dense_decode_kernel<true, 2> : dense_decode_kernel<true, 1>)
           : (plan.cluster == 2 ? dense_decode_kernel<false, 2> : dense_decode_kernel<false, 1>);
  return facts_of(kernel, kThreads, kSmemBytes);
}

KernelFacts combine_kernel_facts(const DecodePlan& plan, bool bf16) {
  KernelFacts facts{};
  with_shape(plan.combine, [&]<int kIndex>() {
    facts = facts_of(bf16 ? combine_kernel<true, kIndex, false> : combine_kernel<false, kIndex, false>,
                     kCombineWarps * 32, combine_smem<kIndex>(plan));
  });
  return facts;
}

}  // namespace flash_mla::sm90
