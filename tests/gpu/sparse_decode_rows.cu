// Checks and times token-sparse decode over FP8 caches on a GPU.
//
//   sparse_decode_rows OUT.json [--reps N] [--rows A:B] [--check-only] [--commit C]
//
// Protocol: random data; every timed call follows a read pass over 256 MiB (cold L2) and is queued behind a spin
// kernel, so that the host is ahead; events around the call, schedule and combine included; median. A sample of rows of every
// shape is checked against float64 over the dequantised cache in the same process.

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
  int v32, page_size;
  long long page_stride;
};
__device__ std::uint8_t* token_at(std::uint8_t* cache, const Layout& l, long long slot,
                                  std::uint8_t*& scales) {
  std::uint8_t* page = cache + slot / l.page_size * l.page_stride;
  const long long offset = slot % l.page_size;
  scales = l.v32 ? page + offset * 656 + 512 : page + l.page_size * 576ll + offset * 8;
  return page + offset * (l.v32 ? 656 : 576);
}

/// One block per token: standard normal values, quantised with scales that are no powers of two in V3.2's format.
__global__ void fill_cache(std::uint8_t* cache, Layout l, long long slots, std::uint64_t seed) {
  for (long long slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    std::uint8_t* scales;
    std::uint8_t* token = token_at(cache, l, slot, scales);
    const int latent = l.v32 ? 512 : 448, tile = l.v32 ? 128 : 64;
    for (int i = threadIdx.x; i < latent; i += blockDim.x) {
      float scale;
      if (l.v32) {
        scale = 0.0004f + 0.0008f * (mix(seed + slot * 8 + i / tile) & 0xFFFF) / 65536.0f;
        if (i % tile == 0) *reinterpret_cast<float*>(scales + i / tile * 4) = scale;
      } else {
        const int e = 116 + mix(seed + slot * 8 + i / tile) % 3;
        scale = exp2f(static_cast<float>(e - 127));
        if (i % tile == 0) scales[i / tile] = static_cast<std::uint8_t>(e);
      }
      token[i] = e4m3(0.1f * normal(seed, slot * 1024 + i) / scale);
    }
    auto* rope = reinterpret_cast<__nv_bfloat16*>(token + (l.v32 ? 528 : 448));
    for (int i = threadIdx.x; i < 64; i += blockDim.x)
      rope[i] = __float2bfloat16(0.1f * normal(seed, slot * 1024 + 600 + i));
  }
}
__device__ float element(std::uint8_t* cache, const Layout& l, long long slot, int i) {
  std::uint8_t* scales;
  std::uint8_t* token = token_at(cache, l, slot, scales);
  const int latent = l.v32 ? 512 : 448;
  if (i >= latent)
    return __bfloat162float(reinterpret_cast<__nv_bfloat16*>(token + (l.v32 ? 528 : 448))[i - latent]);
  const float scale =
      l.v32 ? reinterpret_cast<float*>(scales)[i / 128] : exp2f(static_cast<float>(scales[i / 64]) - 127);
  return e4m3(token[i]) * scale;
}

struct Keys {
  std::uint8_t* cache;
  Layout layout;
  const int* indices;  // (b, s_q, topk)
  int topk;
};
struct Problem {
  const __nv_bfloat16 *q, *out;
  const float *lse, *sink;
  Keys keys[2];
  const int* lengths[2];
  int b, s_q, h, d;
  float scale;
};
struct Sample {
  int req, token, head;
};

/// One block per sample: worst error in units of its bound.
__global__ void __launch_bounds__(256)
    check_rows(Problem p, const Sample* samples, float* scratch, float* worst) {
  const Sample s = samples[blockIdx.x];
  const int total = p.keys[0].topk + p.keys[1].topk;
  float* score = scratch + std::size_t(blockIdx.x) * total;
  const std::size_t row = (std::size_t(s.req) * p.s_q + s.token) * p.h + s.head;
  const auto slot_of = [&](int j, int& which) -> long long {
    which = j >= p.keys[0].topk;
    const int at = which ? j - p.keys[0].topk : j;
    if (at >= (p.lengths[which] ? p.lengths[which][s.req] : p.keys[which].topk)) return -1;
    return p.keys[which].indices[(std::size_t(s.req) * p.s_q + s.token) * p.keys[which].topk + at];
  };
  __shared__ double sum, error[256];
  __shared__ float highest;
  for (int j = threadIdx.x; j < total; j += 256) {
    int which;
    const long long slot = slot_of(j, which);
    double x = -INFINITY;
    if (slot >= 0) {
      x = 0;
      for (int d = 0; d < p.d; ++d)
        x += double(__bfloat162float(p.q[row * p.d + d])) *
             element(p.keys[which].cache, p.keys[which].layout, slot, d);
      x *= p.scale;
    }
    score[j] = static_cast<float>(x);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    highest = -INFINITY;
    for (int j = 0; j < total; ++j) highest = fmaxf(highest, score[j]);
    sum = 0;
    for (int j = 0; j < total; ++j)
      if (score[j] != -INFINITY) sum += exp(double(score[j]) - highest);
  }
  __syncthreads();
  const double sink = p.sink ? exp(double(p.sink[s.head]) - highest) : 0;
  double bad = 0;
  for (int i = threadIdx.x; i < 512; i += 256) {
    double y = 0;
    for (int j = 0; j < total; ++j) {
      int which;
      const long long slot = slot_of(j, which);
      if (slot >= 0)
        y += exp(double(score[j]) - highest) * element(p.keys[which].cache, p.keys[which].layout, slot, i);
    }
    y = sum > 0 ? y / (sum + sink) : 0;
    const double got = __bfloat162float(p.out[row * 512 + i]), off = fabs(got - y);
    const double e = fmin(off / 1e-3, off / (2.01 / 128 * fmax(fabs(y), 1e-30)));
    bad = !(e <= bad) ? (e == e ? e : INFINITY) : bad;
  }
  error[threadIdx.x] = bad;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 256; ++i) bad = fmax(bad, error[i]);
    const float lse = p.lse[(std::size_t(s.req) * p.h + s.head) * p.s_q + s.token];
    const double want = sum > 0 ? highest + log(sum) : INFINITY;
    double off = isinf(want) ? (lse == INFINITY ? 0 : INFINITY)
                             : fabs(lse - want) / (8.01 / 65536 * fmax(fabs(want), 0.25));
    if (!(off >= 0)) off = INFINITY;
    worst[blockIdx.x] = static_cast<float>(fmax(bad, off));
  }
}

struct Row {
  const char* name;
  int v4, b, s_q, h, s_kv, topk, page, extra_s_kv, extra_topk, extra_page;
  int ragged;  // lists with -1 and, with 2, lengths of their own
};

std::vector<Row> rows() {
  std::vector<Row> all;
  // Shapes that are awkward rather than slow.
  all.push_back({"check", 0, 4, 1, 64, 512, 64, 2, 0, 0, 1, 1});
  all.push_back({"check", 0, 4, 3, 128, 1024, 576, 61, 0, 0, 1, 1});
  all.push_back({"check", 0, 74, 1, 100, 2046, 2048, 576, 0, 0, 1, 2});
  all.push_back({"check", 0, 5, 2, 1, 2046, 130, 64, 0, 0, 1, 2});
  all.push_back({"check", 1, 4, 3, 64, 512, 64, 69, 512, 64, 2, 1});
  all.push_back({"check", 1, 33, 1, 128, 1024, 576, 61, 2046, 300, 64, 2});
  for (const int h : {128, 64, 32, 16})
    for (const int b : {1, 2, 32, 64, 128})
      for (const int s_q : {1, 2}) all.push_back({"v3.2", 0, b, s_q, h, 32768, 2048, 64, 0, 0, 1, 0});
  all.push_back({"v4", 1, 128, 1, 64, 16384, 128, 256, 16384, 512, 64, 0});
  all.push_back({"v4", 1, 128, 1, 128, 16384, 128, 256, 16384, 1024, 64, 0});
  all.push_back({"v4", 1, 128, 2, 128, 16384, 128, 256, 16384, 1024, 64, 0});
  return all;
}

struct List {
  DeviceMemory cache, indices, lengths;
  Keys keys{};
  SparseKeys args{};
  List(const Row& row, int s_kv, int topk, int page, bool v4, std::mt19937& rng, std::uint64_t seed)
      : cache(bytes(row.b, s_kv, page, v4)),
        indices(std::size_t(row.b) * row.s_q * std::max(topk, 1) * 4),
        lengths(row.b * 4u) {
    if (topk == 0) return;
    const long long stride = page_stride(page, v4), pages = (s_kv + page - 1) / page * (long long)row.b;
    cache.poison();
    keys = {cache.as<std::uint8_t>(), {!v4, page, stride}, indices.as<int>(), topk};
    fill_cache<<<4096, 128>>>(cache.as<std::uint8_t>(), keys.layout, pages * page, seed);
    std::vector<int> host(std::size_t(row.b) * row.s_q * topk), n(row.b, topk);
    const int per_req = (s_kv + page - 1) / page * page;
    for (int r = 0; r < row.b; ++r) {
      if (row.ragged == 2) n[r] = r % 5 == 1 ? 0 : static_cast<int>(rng() % (topk + 1));
      for (int t = 0; t < row.s_q; ++t) {
        for (int j = 0; j < topk; ++j) {
          int& x = host[(std::size_t(r) * row.s_q + t) * topk + j];
          x = r * per_req + static_cast<int>(rng() % s_kv);
          if (row.ragged && (rng() % 4 == 0 || (r == 2 && t == 0))) x = -1;
          if (j >= n[r]) x = 2147480000;
        }
      }
    }
    indices.upload(host.data(), host.size() * 4);
    lengths.upload(n.data(), n.size() * 4);
    const std::int64_t width = v4 ? 584 : 656;
    args.cache.format = v4 ? KvFormat::kFp8V4 : KvFormat::kFp8V32;
    args.cache.data = TensorView::contiguous(cache.as<void>(), DType::kUInt8, {pages, page, 1, width}, kGpu);
    args.cache.data.strides[0] = stride;
    args.indices = TensorView::contiguous(indices.as<void>(), DType::kInt32, {row.b, row.s_q, topk}, kGpu);
    if (row.ragged == 2)
      args.topk_length = TensorView::contiguous(lengths.as<void>(), DType::kInt32, {row.b}, kGpu);
  }
  const int* lengths_or_null(const Row& row) const { return row.ragged == 2 ? lengths.as<int>() : nullptr; }
  static long long page_stride(int page, bool v4) {
    return v4 ? (page * 584ll + 575) / 576 * 576 : (page + 1) * 656ll;
  }
  static std::size_t bytes(int b, int s_kv, int page, bool v4) {
    return std::max<std::size_t>(std::size_t(s_kv + page - 1) / page * b * page_stride(page, v4), 64);
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s OUT.json [--reps N] [--rows A:B] [--check-only] [--commit C]\n", argv[0]);
    return 2;
  }
  int reps = 30, begin = 0, end = 1 << 30;
  bool check_only = false;
  std::string command = "sparse_decode_rows", commit = "unknown";
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
    const int d = row.v4 ? 512 : 576;
    const std::size_t nq = std::size_t(row.b) * row.s_q * row.h;
    List base(row, row.s_kv, row.topk, row.page, row.v4, rng, 100 + r);
    List extra(row, row.extra_s_kv, row.extra_topk, row.extra_page, row.v4, rng, 200 + r);
    DeviceMemory q(nq * d * 2), out(nq * 512 * 2), lse(nq * 4);
    fill_normal<<<1024, 256>>>(q.as<__nv_bfloat16>(), nq * d, 300 + r);
    out.poison();
    lse.poison();

    const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(d));
    SparseDecodeArgs args;
    args.q = TensorView::contiguous(q.as<void>(), DType::kBFloat16, {row.b, row.s_q, row.h, d}, kGpu);
    args.keys = base.args;
    args.extra = extra.args;
    args.out = TensorView::contiguous(out.as<void>(), DType::kBFloat16, {row.b, row.s_q, row.h, 512}, kGpu);
    args.lse = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {row.b, row.h, row.s_q}, kGpu);
    const SparseDecodeOptions options{.softmax_scale = softmax_scale, .stream = stream};
    DeviceMemory workspace(sparse_decode_workspace_size(args, options));
    workspace.poison();
    check(cudaDeviceSynchronize(), "fill");
    const auto call = [&] { sparse_decode(args, workspace.as<void>(), workspace.bytes(), options); };
    call();
    check(cudaStreamSynchronize(stream), "sparse_decode");

    constexpr int kSamples = 64;
    std::vector<Sample> samples;
    for (int i = 0; i < kSamples; ++i)
      samples.push_back({static_cast<int>(rng() % row.b), static_cast<int>(rng() % row.s_q),
                         static_cast<int>(rng() % row.h)});
    DeviceMemory d_samples(samples.size() * sizeof(Sample)), d_worst(kSamples * 4),
        scratch(std::size_t(kSamples) * (row.topk + row.extra_topk) * 4);
    d_samples.upload(samples.data(), samples.size() * sizeof(Sample));
    const Problem problem{q.as<__nv_bfloat16>(),
                          out.as<__nv_bfloat16>(),
                          lse.as<float>(),
                          nullptr,
                          {base.keys, extra.keys},
                          {base.lengths_or_null(row), extra.lengths_or_null(row)},
                          row.b,
                          row.s_q,
                          row.h,
                          d,
                          softmax_scale};
    check_rows<<<kSamples, 256>>>(problem, d_samples.as<Sample>(), scratch.as<float>(), d_worst.as<float>());
    const std::vector<float> errors = d_worst.download<float>();
    const float worst = *std::max_element(errors.begin(), errors.end());
    const std::vector<std::uint16_t> first = out.download<std::uint16_t>();
    std::size_t nans = 0;
    for (const std::uint16_t x : first) nans += (x & 0x7FFF) > 0x7F80;
    call();
    check(cudaStreamSynchronize(stream), "sparse_decode");
    const bool same = first == out.download<std::uint16_t>();
    const bool good = worst <= 1 && nans == 0 && same;
    failed += !good;

    double ms = 0;
    if (!check_only) {
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
    const double keys = double(row.b) * row.s_q * (row.topk + row.extra_topk);
    const double flop = 2.0 * row.h * keys * (d + 512),
                 bytes = keys * (row.v4 ? 588 : 660) + nq * (d + 512) * 2.0;
    const double floor = std::max(flop / 813e12, bytes / 4.65e12) * 1e3;
    std::printf(
        "%2d %-5s b%-3d s%d h%-3d topk%-4d+%-4d %s %.2f nan %zu %s | %8.2f us floor %7.2f ratio %.2f %4.0f TFLOP/s\n",
        r, row.name, row.b, row.s_q, row.h, row.topk, row.extra_topk, good ? "ok" : "FAIL", worst, nans,
        same ? "same" : "DIFFERS", ms * 1e3, floor * 1e3, ms / floor, ms > 0 ? flop / ms / 1e9 : 0);
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"format\":\"" << row.name << "\",\"b\":" << row.b
         << ",\"s_q\":" << row.s_q << ",\"h_q\":" << row.h << ",\"topk\":" << row.topk
         << ",\"extra_topk\":" << row.extra_topk << ",\"ms\":" << ms << ",\"floor_ms\":" << floor
         << ",\"correct\":" << (good ? "true" : "false") << "}";
  }
  json << "\n]}\n";
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
