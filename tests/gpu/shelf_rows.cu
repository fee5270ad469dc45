// Times the shelf's operations that move data on a GPU, each beside a copy of as many bytes in the same process.
//
//   shelf_rows OUT.json [--reps N]
//
// Protocol: random data; every timed call follows a read pass over 256 MiB (cold L2) and is queued behind a spin kernel, so that the
// host is ahead; events around the call; median. Right results are the conformance suite's subject.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "flash_mla/mhc.h"
#include "flash_mla/pages.h"
#include "flash_mla/rows.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla;
using flash_mla::gpu_test::DeviceMemory;
constexpr Device kGpu{DeviceType::kCuda, 0};

template <class T>
__global__ void fill(T* p, std::size_t n, std::uint32_t seed, float spread) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761u ^ seed;
    x ^= x >> 15;
    x *= 0x2c1b3c6du;
    x ^= x >> 12;
    x *= 0x297a2d39u;
    x ^= x >> 15;
    p[i] = static_cast<T>((static_cast<float>(x) * 2.3283064e-10f - 0.5f) * spread);
  }
}

__global__ void copy(const uint4* from, uint4* to, std::size_t n) {
  for (std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x; i < n;
       i += std::size_t{gridDim.x} * blockDim.x) {
    to[i] = from[i];
  }
}

/// Tensors of a problem, random.
class Tensors {
 public:
  TensorView of(DType dtype, std::initializer_list<std::int64_t> shape, float spread = 3.4f) {
    TensorView t = TensorView::contiguous(nullptr, dtype, shape, kGpu);
    const auto count = static_cast<std::size_t>(t.numel());
    memory_.push_back(std::make_unique<DeviceMemory>(count * dtype_size(dtype)));
    t.data = memory_.back()->as<void>();
    const std::uint32_t seed = 77 * static_cast<std::uint32_t>(memory_.size());
    if (dtype == DType::kBFloat16)
      fill<<<1024, 256>>>(static_cast<__nv_bfloat16*>(t.data), count, seed, spread);
    if (dtype == DType::kFloat32) fill<<<1024, 256>>>(static_cast<float*>(t.data), count, seed, spread);
    return t;
  }
  TensorView of(const std::vector<std::int32_t>& numbers) {
    const TensorView t = of(DType::kInt32, {static_cast<std::int64_t>(numbers.size())});
    memory_.back()->upload(numbers.data(), numbers.size() * 4);
    return t;
  }

 private:
  std::vector<std::unique_ptr<DeviceMemory>> memory_;
};

class Timer {
 public:
  explicit Timer(int reps) : reps_(reps), flush_(kFlush), sink_(16) {
    flush_.poison();
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    check(cudaEventCreate(&before_), "cudaEventCreate");
    check(cudaEventCreate(&after_), "cudaEventCreate");
  }
  template <class F>
  double microseconds(const F& call) {
    std::vector<float> times;
    for (int i = 0; i < reps_ + 3; ++i) {
      read_pass<<<528, 512, 0, stream>>>(flush_.as<uint4>(), kFlush / 16, sink_.as<std::uint32_t>());
      spin<<<1, 1, 0, stream>>>(60000);
      check(cudaEventRecord(before_, stream), "cudaEventRecord");
      call();
      check(cudaEventRecord(after_, stream), "cudaEventRecord");
      check(cudaEventSynchronize(after_), "cudaEventSynchronize");
      float t = 0;
      check(cudaEventElapsedTime(&t, before_, after_), "cudaEventElapsedTime");
      if (i >= 3) times.push_back(t);
    }
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]) * 1e3;
  }
  /// That the call may be captured, and the graph run.
  template <class F>
  void capture(const F& call) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t instance = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    call();
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&instance, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphLaunch(instance, stream), "cudaGraphLaunch");
    check(cudaStreamSynchronize(stream), "cudaGraphLaunch");
    cudaGraphExecDestroy(instance);
    cudaGraphDestroy(graph);
  }
  /// A copy that reads and writes half of `bytes` each.
  double copy_microseconds(double bytes) {
    const auto pieces = static_cast<std::size_t>(bytes / 32) + 1;
    DeviceMemory from(pieces * 16), to(pieces * 16);
    from.poison();
    const auto blocks = static_cast<unsigned>(std::min<std::size_t>((pieces + 511) / 512, 132 * 16));
    return microseconds([&] { copy<<<blocks, 512, 0, stream>>>(from.as<uint4>(), to.as<uint4>(), pieces); });
  }
  cudaStream_t stream = nullptr;

 private:
  static constexpr std::size_t kFlush = 256u << 20;
  int reps_;
  DeviceMemory flush_, sink_;
  cudaEvent_t before_ = nullptr, after_ = nullptr;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: shelf_rows OUT.json [--reps N]\n"), 2;
  Timer timer(argc > 3 && std::strcmp(argv[2], "--reps") == 0 ? std::atoi(argv[3]) : 20);
  std::ofstream json(argv[1]);
  json << "{\"rows\":[";
  bool first = true;
  const auto row = [&](const std::string& name, std::int64_t tokens, std::int64_t d, double bytes,
                       const auto& call) {
    timer.capture(call);
    const double us = timer.microseconds(call), floor = timer.copy_microseconds(bytes);
    std::printf("%-18s tokens %-5lld d %-5lld %8.2f us  copy %8.2f us  ratio %.2f\n", name.c_str(),
                static_cast<long long>(tokens), static_cast<long long>(d), us, floor, us / floor);
    std::fflush(stdout);
    json << (first ? "\n" : ",\n") << "{\"operation\":\"" << name << "\",\"tokens\":" << tokens
         << ",\"d\":" << d << ",\"us\":" << us << ",\"copy_us\":" << floor << "}";
    first = false;
  };
  for (const std::int64_t tokens : {4096, 128, 32}) {
    for (const std::int64_t d : {7168, 4096}) {
      Tensors t;
      const TensorView residual = t.of(DType::kBFloat16, {tokens, 4, d}),
                       x = t.of(DType::kBFloat16, {tokens, d}), out = t.of(DType::kBFloat16, {tokens, 4, d}),
                       input = t.of(DType::kBFloat16, {tokens, d}), norm = t.of(DType::kBFloat16, {d}),
                       post = t.of(DType::kFloat32, {tokens, 4}),
                       comb = t.of(DType::kFloat32, {tokens, 4, 4});
      const MhcWeights weights{t.of(DType::kFloat32, {24, 4 * d}, 0.02f), t.of(DType::kFloat32, {3}),
                               t.of(DType::kFloat32, {24}), norm};
      const MhcMixes mixes{t.of(DType::kFloat32, {tokens, 4}), t.of(DType::kFloat32, {tokens, 4, 4}), input};
      MhcOptions options;
      options.stream = timer.stream;
      const auto one = static_cast<double>(tokens * d * 2);
      row("mhc_pre", tokens, d, 5 * one, [&] { mhc_pre(residual, weights, mixes, options); });
      row("mhc_post", tokens, d, 9 * one, [&] { mhc_post(x, residual, post, comb, out, options); });
      row("mhc_post_pre", tokens, d, 10 * one,
          [&] { mhc_post_pre(x, residual, post, comb, out, weights, mixes, options); });
    }
    for (const std::int64_t d : {7168, 4096}) {
      Tensors t;
      const TensorView x = t.of(DType::kBFloat16, {tokens, d}),
                       residual = t.of(DType::kBFloat16, {tokens, d}),
                       out = t.of(DType::kBFloat16, {tokens, d}), narrow = t.of(DType::kUInt8, {tokens, d}),
                       weight = t.of(DType::kBFloat16, {d});
      RowOptions options;
      options.stream = timer.stream;
      RmsNormOptions scaled;
      scaled.out_scale = 0.02f;
      const auto one = static_cast<double>(tokens * d);
      row("rms_norm", tokens, d, 4 * one, [&] { rms_norm(x, weight, out, {}, options); });
      row("rms_norm e4m3", tokens, d, 3 * one, [&] { rms_norm(x, weight, narrow, scaled, options); });
      row("add_rms_norm", tokens, d, 8 * one, [&] { add_rms_norm(x, residual, weight, out, {}, options); });
      row("add_rms_norm e4m3", tokens, d, 7 * one,
          [&] { add_rms_norm(x, residual, weight, narrow, scaled, options); });
    }
    for (const std::int64_t page_size : {64, 16}) {
      Tensors t;
      constexpr std::int64_t kHeads = 8, kWidth = 128, kBatch = 16;
      const std::int64_t pages_each = (tokens / kBatch + page_size - 1) / page_size + 1,
                         pages = kBatch * pages_each;
      std::vector<std::int32_t> indptr{0}, indices, sequences, positions;
      for (std::int64_t i = 0; i < kBatch; ++i) {
        for (std::int64_t j = 0; j < pages_each; ++j)
          indices.push_back(static_cast<std::int32_t>((i * pages_each + j) * 7919 % pages));
        indptr.push_back(static_cast<std::int32_t>(indices.size()));
        for (std::int64_t j = 0; j < tokens / kBatch; ++j) {
          sequences.push_back(static_cast<std::int32_t>(i));
          positions.push_back(static_cast<std::int32_t>(j + page_size / 2));
        }
      }
      PageAppendArgs a;
      a.key = t.of(DType::kBFloat16, {tokens, kHeads, kWidth});
      a.value = t.of(DType::kBFloat16, {tokens, kHeads, kWidth});
      a.k_cache = t.of(DType::kBFloat16, {pages, page_size, kHeads, kWidth});
      a.v_cache = t.of(DType::kBFloat16, {pages, page_size, kHeads, kWidth});
      a.batch_indices = t.of(sequences);
      a.positions = t.of(positions);
      a.page_indptr = t.of(indptr);
      a.page_indices = t.of(indices);
      RowOptions options;
      options.stream = timer.stream;
      row("append page " + std::to_string(page_size), tokens, kHeads * kWidth,
          static_cast<double>(tokens * kHeads * kWidth * 2) * 4, [&] { append_pages(a, options); });
    }
  }
  json << "\n]}\n";
  return 0;
}
