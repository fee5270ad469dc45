// Times of the indexer's logits and of logits with selection on a GPU; conformance_gpu says whether they are right.
//
//   indexer_rows FILE.json [--reps N]

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/indexer.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla;

constexpr int kPage = 64, kDim = 128, kPageBytes = kPage * (kDim + 4);

struct Case {
  const char* kind;  // decode: paged; prefill: ragged and causal, the queries being the last keys
  int rows, keys, heads;
  bool selects;
};

constexpr Case kCases[] = {
    {"decode", 128, 8192, 64, false},     {"decode", 128, 32768, 64, false},
    {"decode", 128, 131072, 64, false},   {"decode", 128, 131072, 32, false},
    {"decode", 32, 131072, 64, false},    {"decode", 8, 131072, 64, false},
    {"decode", 1, 131072, 64, false},     {"decode", 128, 131072, 64, true},
    {"prefill", 4096, 8192, 64, false},   {"prefill", 4096, 32768, 64, false},
    {"prefill", 4096, 131072, 64, false}, {"prefill", 4096, 131072, 32, false},
    {"prefill", 4096, 131072, 64, true},
};

__device__ unsigned hash(unsigned long long x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<unsigned>(x ^ (x >> 31));
}

/// e4m3 of magnitudes below 2.
__global__ void fill_e4m3(unsigned char* to, std::size_t n, unsigned seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    to[i] = hash(i * 2 + seed) & 0xBF;
  }
}
__global__ void fill_floats(float* to, std::size_t n, float scale, unsigned seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    to[i] = (static_cast<float>(hash(i * 2 + seed) >> 8) * 0x1p-24f - 0.3f) * scale;
  }
}
__global__ void fill_scales(unsigned char* cache, std::size_t pages) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < pages * kPage;
       i += std::size_t(gridDim.x) * blockDim.x) {
    reinterpret_cast<float*>(cache + i / kPage * kPageBytes + kPage * kDim)[i % kPage] =
        static_cast<float>(hash(i) >> 8) * 0x1p-24f + 0.01f;
  }
}

template <class T>
T* allocate(std::size_t n) {
  T* p = nullptr;
  check(cudaMalloc(&p, n * sizeof(T) + 64), "cudaMalloc");
  return p;
}
template <class T>
T* upload(const std::vector<T>& v) {
  T* p = allocate<T>(v.size());
  check(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "indexer_rows.json";
  const int reps = argc > 3 && std::strcmp(argv[2], "--reps") == 0 ? std::stoi(argv[3]) : 30;
  const Device gpu{DeviceType::kCuda, 0};
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaEvent_t before = nullptr, after = nullptr;
  check(cudaEventCreate(&before), "cudaEventCreate");
  check(cudaEventCreate(&after), "cudaEventCreate");
  constexpr std::size_t kFlush = std::size_t{256} << 20;
  auto* flush = allocate<char>(kFlush);
  auto* sink = allocate<std::uint32_t>(1);
  check(cudaMemset(flush, 1, kFlush), "cudaMemset");
  std::ofstream json(path);
  json << "{\"reps\":" << reps << ",\"rows\":[";
  int done = 0;
  for (const Case& c : kCases) {
    const bool paged = std::strcmp(c.kind, "decode") == 0;
    const std::size_t rows = static_cast<std::size_t>(c.rows), heads = static_cast<std::size_t>(c.heads);
    const std::size_t blocks = static_cast<std::size_t>(c.keys) / kPage;
    const std::size_t key_bytes =
        paged ? rows * blocks * kPageBytes : static_cast<std::size_t>(c.keys) * kDim;
    auto* q = allocate<unsigned char>(rows * heads * kDim);
    auto* weights = allocate<float>(rows * heads);
    auto* keys = allocate<unsigned char>(key_bytes);
    auto* scales = allocate<float>(static_cast<std::size_t>(c.keys));
    fill_e4m3<<<512, 256>>>(q, rows * heads * kDim, 1);
    fill_floats<<<512, 256>>>(weights, rows * heads, 0.1f, 2);
    fill_e4m3<<<2048, 256>>>(keys, key_bytes, 3);
    fill_floats<<<512, 256>>>(scales, static_cast<std::size_t>(c.keys), 0.1f, 4);
    if (paged) fill_scales<<<512, 256>>>(keys, rows * blocks);
    std::vector<int> table, begin(rows, 0), end;
    for (std::size_t i = 0; i < rows * blocks; ++i)
      table.push_back(static_cast<int>(i * 7919 % (rows * blocks)));
    for (std::size_t i = 0; i < rows; ++i) {
      end.push_back(paged ? c.keys : c.keys - c.rows + static_cast<int>(i) + 1);
    }
    auto *d_table = upload(table), *d_begin = upload(begin), *d_end = upload(end);
    auto* logits = c.selects ? nullptr : allocate<float>(rows * static_cast<std::size_t>(c.keys));
    auto* indices = allocate<int>(rows * 2048);
    const auto bytes_of = [&](void* p, std::initializer_list<std::int64_t> shape) {
      return TensorView::contiguous(p, DType::kUInt8, shape, gpu);
    };
    const auto floats_of = [&](void* p, std::initializer_list<std::int64_t> shape) {
      return TensorView::contiguous(p, DType::kFloat32, shape, gpu);
    };
    const auto ints_of = [&](void* p, std::initializer_list<std::int64_t> shape) {
      return TensorView::contiguous(p, DType::kInt32, shape, gpu);
    };
    const std::int64_t m = c.rows, n = c.keys, h = c.heads;
    MqaLogitsArgs ragged;
    PagedMqaLogitsArgs decode;
    ragged.q = bytes_of(q, {m, h, kDim});
    decode.q = bytes_of(q, {m, 1, h, kDim});
    ragged.weights = decode.weights = floats_of(weights, {m, h});
    ragged.k = bytes_of(keys, {n, kDim});
    ragged.k_scales = floats_of(scales, {n});
    ragged.key_begin = ints_of(d_begin, {m});
    ragged.key_end = decode.context_lens = ints_of(d_end, {m});
    if (paged) decode.cache = bytes_of(keys, {m * static_cast<std::int64_t>(blocks), kPage, 1, kDim + 4});
    decode.block_table = ints_of(d_table, {m, static_cast<std::int64_t>(blocks)});
    if (!c.selects) ragged.logits = decode.logits = floats_of(logits, {m, n});
    ragged.clean = decode.clean = false;
    const TensorView chosen = ints_of(indices, {m, 2048});
    MqaTopKOptions options;
    options.indexer.stream = stream;
    std::size_t workspace_bytes = 0;
    if (c.selects) {
      workspace_bytes = paged ? paged_mqa_top_k_workspace_size(decode, {}, chosen, options)
                              : mqa_top_k_workspace_size(ragged, {}, chosen, options);
    }
    auto* workspace = allocate<char>(workspace_bytes);
    const auto call = [&] {
      if (c.selects && paged) paged_mqa_top_k(decode, {}, chosen, workspace, workspace_bytes, options);
      if (c.selects && !paged) mqa_top_k(ragged, {}, chosen, workspace, workspace_bytes, options);
      if (!c.selects && paged) paged_mqa_logits(decode, nullptr, 0, options.indexer);
      if (!c.selects && !paged) mqa_logits(ragged, nullptr, 0, options.indexer);
    };
    std::vector<float> times;
    for (int i = 0; i < reps + 3; ++i) {
      read_pass<<<528, 512, 0, stream>>>(reinterpret_cast<const uint4*>(flush), kFlush / 16, sink);
      spin<<<1, 1, 0, stream>>>(60000);
      check(cudaEventRecord(before, stream), "cudaEventRecord");
      call();
      check(cudaEventRecord(after, stream), "cudaEventRecord");
      check(cudaEventSynchronize(after), "cudaEventSynchronize");
      float t = 0;
      check(cudaEventElapsedTime(&t, before, after), "cudaEventElapsedTime");
      if (i >= 3) times.push_back(t);
    }
    std::sort(times.begin(), times.end());
    const double us = static_cast<double>(times[times.size() / 2]) * 1e3;
    double pairs = 0;
    for (const int e : end) pairs += e;
    const double flop = pairs * 2.0 * kDim * c.heads;
    const double read = paged ? pairs * 132 : n * 132.0;
    const double floor = std::max((read + pairs * 4) / 4.65e6, flop / 1979e6);
    std::printf("%-7s %4d x %6d h %2d %s | %9.2f us, floor %8.2f, %5.0f TFLOP/s\n", c.kind, c.rows, c.keys,
                c.heads, c.selects ? "top_k " : "logits", us, floor, flop / us / 1e6);
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"kind\":\"" << c.kind << "\",\"rows\":" << c.rows
         << ",\"keys\":" << c.keys << ",\"heads\":" << c.heads
         << ",\"selects\":" << (c.selects ? "true" : "false") << ",\"us\":" << us << ",\"floor_us\":" << floor
         << "}";
    for (void* p : {static_cast<void*>(q), static_cast<void*>(weights), static_cast<void*>(keys),
                    static_cast<void*>(scales), static_cast<void*>(d_table), static_cast<void*>(d_begin),
                    static_cast<void*>(d_end), static_cast<void*>(logits), static_cast<void*>(indices),
                    static_cast<void*>(workspace)}) {
      check(cudaFree(p), "cudaFree");
    }
  }
  json << "\n]}\n";
  return 0;
}
