// Checks and times token-sparse prefill on a GPU.
//
//   sparse_prefill_rows OUT.json [--reps N] [--rows A:B] [--check-only] [--commit C]
//
// Protocol: random data; every timed call follows a read pass over 256 MiB (cold L2) and is queued behind a spin kernel,
// so that the host is ahead; events around the call; median. A sample of rows of every shape is checked against float64
// over the (dequantised) cache in the same process; what lies between tokens and pages holds NaN.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "flash_mla/sparse.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla;
using gpu_test::DeviceMemory;
constexpr Device kGpu{DeviceType::kCuda, 0};

__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x >> 32);
}
__device__ float normal(std::uint64_t seed, std::uint64_t i) {
  const float u = (mix(seed * 0x9E3779B97F4A7C15ull + 2 * i) + 1.0f) * 2.3283064e-10f;
  const float v = mix(seed * 0x9E3779B97F4A7C15ull + 2 * i + 1) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(fmaxf(u, 1e-10f))) * cospif(2.0f * v);
}
__global__ void fill_normal(__nv_bfloat16* p, std::size_t n, std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x)
    p[i] = __float2bfloat16(normal(seed, i));
}
__device__ std::uint8_t e4m3(float x) {
  std::uint16_t y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  return static_cast<std::uint8_t>(y);
}
__device__ float e4m3(std::uint8_t x) {
  std::uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(static_cast<std::uint16_t>(x)));
  return __half2float(__ushort_as_half(static_cast<unsigned short>(h)));
}

struct Layout {
  KvFormat format;
  int d, page_size;
  long long page_stride, token_bytes;
};
/// Element i of the token in `slot`: where it lies, and for e4m3 the scale.
__device__ float element(const std::uint8_t* cache, const Layout& l, long long slot, int i) {
  const std::uint8_t* page = cache + slot / l.page_size * l.page_stride;
  const long long offset = slot % l.page_size;
  const std::uint8_t* row = page + offset * l.token_bytes;
  if (l.format == KvFormat::kBFloat16)
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  if (l.format == KvFormat::kFp8V32) {
    if (i >= 512) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + 528)[i - 512]);
    return e4m3(row[i]) * reinterpret_cast<const float*>(row + 512)[i / 128];
  }
  if (i >= 448) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(row + 448)[i - 448]);
  return e4m3(row[i]) * exp2f(float((page + l.page_size * 576ll + offset * 8)[i / 64]) - 127);
}
/// One block per token.
__global__ void fill_cache(std::uint8_t* cache, Layout l, long long slots, std::uint64_t seed) {
  for (long long slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    std::uint8_t* page = cache + slot / l.page_size * l.page_stride;
    const long long offset = slot % l.page_size;
    std::uint8_t* row = page + offset * l.token_bytes;
    const auto value = [&](int i) { return 0.35f * normal(seed, slot * 1024 + i); };
    for (int i = threadIdx.x; i < l.d; i += blockDim.x) {
      if (l.format == KvFormat::kBFloat16) {
        reinterpret_cast<__nv_bfloat16*>(row)[i] = __float2bfloat16(value(i));
      } else if (l.format == KvFormat::kFp8V32) {
        const float scale = 0.002f + 0.004f * (mix(seed + slot * 8 + i / 128) & 0xFFFF) / 65536.0f;
        if (i % 128 == 0 && i < 512) reinterpret_cast<float*>(row + 512)[i / 128] = scale;
        if (i < 512) row[i] = e4m3(value(i) / scale);
        if (i >= 512) reinterpret_cast<__nv_bfloat16*>(row + 528)[i - 512] = __float2bfloat16(value(i));
      } else {
        const int e = 118 + mix(seed + slot * 8 + i / 64) % 3;
        if (i % 64 == 0 && i < 448) (page + l.page_size * 576ll + offset * 8)[i / 64] = std::uint8_t(e);
        if (i < 448) row[i] = e4m3(value(i) / exp2f(float(e - 127)));
        if (i >= 448) reinterpret_cast<__nv_bfloat16*>(row + 448)[i - 448] = __float2bfloat16(value(i));
      }
    }
  }
}
/// Lists of random tokens; ragged: a third is none, and a third of what is left repeats its neighbour.
__global__ void fill_lists(int* indices, int* lengths, int n, int topk, int s_kv, int slots, int ragged,
                           std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < std::size_t(n) * topk;
       i += std::size_t(gridDim.x) * blockDim.x) {
    const int token = int(i / topk), at = int(i % topk);
    const int length = ragged ? (token % 5 == 1 ? 0 : int(mix(seed * 3 + token) % (topk + 1))) : topk;
    int x = int(mix(seed * 0x9E3779B97F4A7C15ull + (ragged && i % 9 == 4 ? i - 1 : i)) % s_kv);
    if (ragged && i % 3 == 0) x = i % 2 == 0 ? -1 : slots + int(i % 1000000);
    if (at >= length) x = 2147480000 - int(i % 7);
    if (at >= length && i % 2 == 0) x = int(i % s_kv);
    indices[i] = x;
    if (at == 0) lengths[token] = length;
  }
}

struct Problem {
  const __nv_bfloat16 *q, *out;
  const float *max_logits, *lse, *sink;
  const std::uint8_t* cache;
  Layout layout;
  const int *indices, *lengths;
  int h, topk, s_kv;
  float scale;
  float out_bound;
  float score_bound;  // widened keys are rounded to bfloat16 where their scales are no powers of two
};
struct Sample {
  int token, head;
};

/// One block per sample: worst error in units of its bound.
__global__ void __launch_bounds__(256)
    check_rows(Problem p, const Sample* samples, double* scratch, float* worst) {
  const Sample s = samples[blockIdx.x];
  double* score = scratch + std::size_t(blockIdx.x) * p.topk;
  const std::size_t row = std::size_t(s.token) * p.h + s.head;
  const int length = p.lengths[s.token];
  const auto slot_of = [&](int j) {
    const int x = j < length ? p.indices[std::size_t(s.token) * p.topk + j] : -1;
    return x >= 0 && x < p.s_kv ? x : -1;
  };
  __shared__ double sum, error[256], highest;
  for (int j = threadIdx.x; j < p.topk; j += 256) {
    const int slot = slot_of(j);
    double x = -INFINITY;
    if (slot >= 0) {
      x = 0;
      for (int d = 0; d < p.layout.d; ++d)
        x += double(__bfloat162float(p.q[row * p.layout.d + d])) * element(p.cache, p.layout, slot, d);
      x *= p.scale;
    }
    score[j] = x;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    highest = -INFINITY;
    for (int j = 0; j < p.topk; ++j) highest = fmax(highest, score[j]);
    sum = 0;
    for (int j = 0; j < p.topk; ++j)
      if (score[j] != -INFINITY) sum += exp(score[j] - highest);
  }
  __syncthreads();
  const double sink = p.sink && sum > 0 ? exp(double(p.sink[s.head]) - highest) : 0;
  double bad = 0;
  for (int i = threadIdx.x; i < 512; i += 256) {
    double y = 0;
    for (int j = 0; j < p.topk; ++j) {
      const int slot = slot_of(j);
      if (slot >= 0) y += exp(score[j] - highest) * element(p.cache, p.layout, slot, i);
    }
    y = sum > 0 ? y / (sum + sink) : 0;
    const double got = __bfloat162float(p.out[row * 512 + i]), off = fabs(got - y);
    const double e = fmin(off / p.out_bound, off / (3.01 / 128 * fmax(fabs(y), 1e-30)));
    bad = !(e <= bad) ? (e == e ? e : INFINITY) : bad;
  }
  error[threadIdx.x] = bad;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 256; ++i) bad = fmax(bad, error[i]);
  const auto compare = [&](float got, double want) {
    if (isinf(want)) return got == want ? 0.0 : INFINITY;
    const double off = fmin(fabs(got - want) / p.score_bound, fabs(got - want) / (2.01 / 65536 * fabs(want)));
    return off >= 0 ? off : INFINITY;
  };
  bad = fmax(bad, compare(p.lse[row], sum > 0 ? highest + log(sum) : INFINITY));
  worst[blockIdx.x] = float(fmax(bad, compare(p.max_logits[row], highest)));
}

struct Row {
  const char* name;
  KvFormat format;
  int d, n, h, s_kv, topk, page;  // page 0: one of all tokens
  int ragged;
};

std::vector<Row> rows() {
  constexpr KvFormat kRows = KvFormat::kBFloat16;
  std::vector<Row> all;
  // Shapes that are awkward rather than slow.
  for (const int d : {576, 512})
    for (const int h : {1, 16, 64, 100, 128, 200})
      all.push_back({"check", kRows, d, 150, h, 2046, 130 + h, 61, 1});
  all.push_back({"check", kRows, 576, 300, 128, 700, 64, 0, 1});
  for (const int h : {1, 64, 100, 128}) {
    all.push_back({"check", KvFormat::kFp8V32, 576, 150, h, 2046, 130 + h, 61, 1});
    all.push_back({"check", KvFormat::kFp8V4, 512, 150, h, 2046, 130 + h, 61, 1});
  }
  for (const int s_kv : {8192, 32768, 65536, 131072})
    all.push_back({"bf16", kRows, 576, 4096, 128, s_kv, 2048, 0, 0});
  all.push_back({"bf16", kRows, 576, 4096, 64, 32768, 2048, 0, 0});
  all.push_back({"bf16", kRows, 576, 4096, 16, 32768, 2048, 0, 0});
  all.push_back({"bf16", kRows, 512, 4096, 64, 8192, 512, 0, 0});
  all.push_back({"bf16", kRows, 512, 4096, 128, 8192, 1024, 0, 0});
  for (const int h : {128, 64}) all.push_back({"v3.2", KvFormat::kFp8V32, 576, 4096, h, 32768, 2048, 64, 0});
  all.push_back({"v4", KvFormat::kFp8V4, 512, 4096, 128, 8192, 1024, 256, 0});
  all.push_back({"v4", KvFormat::kFp8V4, 512, 4096, 64, 8192, 512, 256, 0});
  return all;
}

long long page_stride(const Row& row, int page) {
  switch (row.format) {
    case KvFormat::kBFloat16:
      return (page + 1ll) * row.d * 2;
    case KvFormat::kFp8V32:
      return (page + 1ll) * 656;
    default:
      return (page * 584ll + 575) / 576 * 576;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s OUT.json [--reps N] [--rows A:B] [--check-only] [--commit C]\n", argv[0]);
    return 2;
  }
  int reps = 30, begin = 0, end = 1 << 30;
  bool check_only = false;
  std::string command = "sparse_prefill_rows", commit = "unknown";
  for (int i = 1; i < argc; ++i) command += std::string(" ") + argv[i];
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--check-only") == 0) {
      check_only = true;
    } else if (std::strcmp(argv[i], "--reps") == 0 && i + 1 < argc) {
      reps = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--commit") == 0 && i + 1 < argc) {
      commit = argv[++i];
    } else if (std::strcmp(argv[i], "--rows") == 0 && i + 1 < argc) {
      std::sscanf(argv[++i], "%d:%d", &begin, &end);
    }
  }
  std::ofstream json(argv[1]);
  cudaDeviceProp device{};
  int driver = 0, runtime = 0;
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  json << "{\"machine\": {\"gpu\": \"" << device.name << "\", \"cuda_driver\": " << driver
       << ", \"cuda_runtime\": " << runtime << "},\n\"command\": \"" << command << "\",\n\"commit\": \""
       << commit << "\",\n\"rows\": [";
  constexpr std::size_t kFlush = 256u << 20;
  DeviceMemory flush(kFlush), sink_memory(16);
  flush.poison();
  cudaStream_t stream = nullptr;
  cudaEvent_t before = nullptr, after = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaEventCreate(&before), "cudaEventCreate");
  check(cudaEventCreate(&after), "cudaEventCreate");
  int failed = 0, done = 0;
  const std::vector<Row> all = rows();
  for (int r = begin; r < std::min(end, static_cast<int>(all.size())); ++r) {
    const Row& row = all[static_cast<std::size_t>(r)];
    std::mt19937 rng(static_cast<unsigned>(r) + 1);
    const int page = row.page == 0 ? row.s_kv : row.page;
    const long long pages = (row.s_kv + page - 1) / page, stride = page_stride(row, page);
    const int width = row.format == KvFormat::kBFloat16 ? row.d : row.format == KvFormat::kFp8V32 ? 656 : 584;
    const Layout layout{row.format, row.d, page, stride,
                        row.format == KvFormat::kBFloat16 ? row.d * 2
                        : row.format == KvFormat::kFp8V32 ? 656
                                                          : 576};
    const std::size_t nq = std::size_t(row.n) * row.h;
    DeviceMemory cache(static_cast<std::size_t>(pages * stride)), q(nq * row.d * 2), out(nq * 1024),
        lse(nq * 4), max_logits(nq * 4), indices(std::size_t(row.n) * row.topk * 4), lengths(row.n * 4u),
        sink(row.h * 4u);
    for (const DeviceMemory* memory : {&cache, &out, &lse, &max_logits})
      check(cudaMemset(memory->as<void>(), 0xFF, memory->bytes()), "cudaMemset");
    // The last page's rest and the strides' gaps keep their NaN.
    fill_cache<<<4096, 128>>>(cache.as<std::uint8_t>(), layout, row.s_kv, 100 + r);
    fill_normal<<<1024, 256>>>(q.as<__nv_bfloat16>(), nq * row.d, 300 + r);
    fill_lists<<<1024, 256>>>(indices.as<int>(), lengths.as<int>(), row.n, row.topk, row.s_kv,
                              static_cast<int>(pages * page), row.ragged, 400 + r);
    std::vector<float> sinks;
    for (int h = 0; h < row.h; ++h) sinks.push_back(static_cast<float>(rng() % 1000) / 200.0f);
    sink.upload(sinks.data(), sinks.size() * 4);

    SparsePrefillArgs args;
    args.q = TensorView::contiguous(q.as<void>(), DType::kBFloat16, {row.n, row.h, row.d}, kGpu);
    args.cache.format = row.format;
    args.cache.data = TensorView::contiguous(
        cache.as<void>(), row.format == KvFormat::kBFloat16 ? DType::kBFloat16 : DType::kUInt8,
        {pages, page, 1, width}, kGpu);
    args.cache.data.strides[0] = row.format == KvFormat::kBFloat16 ? stride / 2 : stride;
    args.indices = TensorView::contiguous(indices.as<void>(), DType::kInt32, {row.n, row.topk}, kGpu);
    if (row.ragged) {
      args.topk_length = TensorView::contiguous(lengths.as<void>(), DType::kInt32, {row.n}, kGpu);
      args.attn_sink = TensorView::contiguous(sink.as<void>(), DType::kFloat32, {row.h}, kGpu);
    }
    args.out = TensorView::contiguous(out.as<void>(), DType::kBFloat16, {row.n, row.h, 512}, kGpu);
    args.max_logits = TensorView::contiguous(max_logits.as<void>(), DType::kFloat32, {row.n, row.h}, kGpu);
    args.lse = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {row.n, row.h}, kGpu);
    const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(row.d));
    const SparsePrefillOptions options{.softmax_scale = softmax_scale, .stream = stream};
    DeviceMemory workspace(sparse_prefill_workspace_size(args, options) + 64);
    check(cudaDeviceSynchronize(), "fill");
    const auto call = [&] { sparse_prefill(args, workspace.as<void>(), workspace.bytes(), options); };
    call();
    check(cudaStreamSynchronize(stream), "sparse_prefill");

    constexpr int kSamples = 128;
    std::vector<Sample> samples;
    for (int i = 0; i < kSamples; ++i)
      samples.push_back({static_cast<int>(rng() % row.n), static_cast<int>(rng() % row.h)});
    DeviceMemory d_samples(samples.size() * sizeof(Sample)), d_worst(kSamples * 4),
        scratch(std::size_t(kSamples) * row.topk * 8);
    d_samples.upload(samples.data(), samples.size() * sizeof(Sample));
    const Problem problem{q.as<__nv_bfloat16>(),
                          out.as<__nv_bfloat16>(),
                          max_logits.as<float>(),
                          lse.as<float>(),
                          row.ragged ? sink.as<float>() : nullptr,
                          cache.as<std::uint8_t>(),
                          layout,
                          indices.as<int>(),
                          lengths.as<int>(),
                          row.h,
                          row.topk,
                          row.s_kv,
                          softmax_scale,
                          row.format == KvFormat::kFp8V32 ? 1.6e-3f : 8e-4f,
                          row.format == KvFormat::kFp8V32 ? 2.5e-3f : 1e-6f};
    check_rows<<<kSamples, 256>>>(problem, d_samples.as<Sample>(), scratch.as<double>(), d_worst.as<float>());
    const std::vector<float> errors = d_worst.download<float>();
    const float worst = *std::max_element(errors.begin(), errors.end());
    const std::vector<std::uint16_t> first = out.download<std::uint16_t>();
    std::size_t nans = 0;
    for (const std::uint16_t x : first) nans += (x & 0x7FFF) > 0x7F80;
    bool same = true;
    for (int repeat = 0; repeat < 3; ++repeat) {
      check(cudaMemset(out.as<void>(), 0xFF, out.bytes()), "cudaMemset");
      call();
      check(cudaStreamSynchronize(stream), "sparse_prefill");
      same = same && first == out.download<std::uint16_t>();
    }
    const bool good = worst <= 1 && nans == 0 && same;
    failed += !good;

    double ms = 0;
    if (!check_only && std::strcmp(row.name, "check") != 0) {
      std::vector<float> times;
      for (int i = 0; i < reps + 3; ++i) {
        read_pass<<<528, 512, 0, stream>>>(flush.as<uint4>(), kFlush / 16, sink_memory.as<std::uint32_t>());
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
      ms = times[times.size() / 2];
    }
    const double keys = double(row.n) * row.topk, flop = 2.0 * row.h * keys * (row.d + 512);
    const double floor = flop / 758e12 * 1e3;
    std::printf("%2d %-5s f%d d%d n%-4d h%-3d s_kv%-6d topk%-4d %s %.2f nan %zu %s", r, row.name,
                static_cast<int>(row.format), row.d, row.n, row.h, row.s_kv, row.topk, good ? "ok" : "FAIL",
                worst, nans, same ? "same" : "DIFFERS");
    if (ms > 0)
      std::printf(" | %7.3f ms floor %6.3f ratio %.2f %4.0f TFLOP/s", ms, floor, ms / floor, flop / ms / 1e9);
    std::printf("\n");
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"name\":\"" << row.name << "\",\"format\":\""
         << kv_format_name(row.format) << "\",\"d_qk\":" << row.d << ",\"n\":" << row.n
         << ",\"h_q\":" << row.h << ",\"s_kv\":" << row.s_kv << ",\"topk\":" << row.topk << ",\"ms\":" << ms
         << ",\"floor_ms\":" << floor << ",\"correct\":" << (good ? "true" : "false") << "}";
  }
  json << "\n]}\n";
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
