// Checks and times un-absorbed prefill on a GPU.
//
//   dense_prefill_rows OUT.json [--reps N] [--rows A:B] [--check-only]
//
// Protocol: random data; every timed call follows a read pass over 256 MiB (cold L2) and is queued behind a
// spin kernel, so that the host is ahead; events around the call; median. TFLOP/s count 2 * heads * visible
// pairs * (192 + 128). A sample of rows of every shape is checked against float32 in the same process.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include "device.h"
#include "kernels/attention/dense_prefill/sm90/dense_prefill.h"
#include "protocol.cuh"

namespace {

using flash_mla::check;
using flash_mla::gpu_test::DeviceMemory;
constexpr flash_mla::Device kGpu{flash_mla::DeviceType::kCuda, 0};
constexpr float kScale = 0.1352338f;

__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x >> 32);
}

__global__ void fill_normal(__nv_bfloat16* p, std::size_t n, std::uint64_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    const float u = (mix(seed * 0x9E3779B97F4A7C15ull + 2 * i) + 1.0f) * 2.3283064e-10f;
    const float v = mix(seed * 0x9E3779B97F4A7C15ull + 2 * i + 1) * 2.3283064e-10f;
    p[i] = __float2bfloat16(sqrtf(-2.0f * logf(fmaxf(u, 1e-10f))) * cospif(2.0f * v) * 0.7f);
  }
}

__global__ void count_nan(const __nv_bfloat16* p, std::size_t n, unsigned long long* found) {
  unsigned long long mine = 0;
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x)
    mine += __hisnan(p[i]);
  if (mine > 0) atomicAdd(found, mine);
}

/// Equal sequences, kv = (total_k, heads, 256), latent rows of 576.
struct Problem {
  const __nv_bfloat16 *q, *kv, *latent, *out;
  const float* lse;
  int heads, len_q, len_k, causal, total_q;
};
struct Sample {
  int seq, query, head;
};

/// One block per sample: worst error of the row in units of its bound, and of lse.
__global__ void __launch_bounds__(256)
    check_rows(Problem p, const Sample* samples, float* scores, float* worst) {
  const Sample s = samples[blockIdx.x];
  const int visible = p.causal ? p.len_k - p.len_q + s.query + 1 : p.len_k;
  const std::size_t row = std::size_t(s.seq) * p.len_q + s.query, key = std::size_t(s.seq) * p.len_k;
  float* score = scores + std::size_t(blockIdx.x) * p.len_k;
  __shared__ float query[192], shared[256];
  if (threadIdx.x < 192)
    query[threadIdx.x] = __bfloat162float(p.q[(row * p.heads + s.head) * 192 + threadIdx.x]);
  __syncthreads();
  float highest = -INFINITY;
  for (int j = threadIdx.x; j < visible; j += 256) {
    const __nv_bfloat16* nope = p.kv + ((key + j) * p.heads + s.head) * 256;
    const __nv_bfloat16* rope = p.latent + (key + j) * 576 + 512;
    float x = 0;
    for (int d = 0; d < 192; ++d) x += query[d] * __bfloat162float(d < 128 ? nope[d] : rope[d - 128]);
    score[j] = x * kScale;
    highest = fmaxf(highest, x * kScale);
  }
  shared[threadIdx.x] = highest;
  for (int i = 128; i > 0; i /= 2) {
    __syncthreads();
    if (threadIdx.x < i) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + i]);
  }
  __syncthreads();
  highest = shared[0];
  __syncthreads();
  float sum = 0;
  for (int j = threadIdx.x; j < visible; j += 256) sum += expf(score[j] - highest);
  shared[threadIdx.x] = sum;
  for (int i = 128; i > 0; i /= 2) {
    __syncthreads();
    if (threadIdx.x < i) shared[threadIdx.x] += shared[threadIdx.x + i];
  }
  __syncthreads();
  sum = shared[0];
  __syncthreads();
  float error = 0;
  if (threadIdx.x < 128) {
    double y = 0, size = 0;
    for (int j = 0; j < visible; ++j) {
      const double x = expf(score[j] - highest) / sum *
                       __bfloat162float(p.kv[((key + j) * p.heads + s.head) * 256 + 128 + threadIdx.x]);
      y += x;
      size += fabs(x);
    }
    const float got = __bfloat162float(p.out[(row * p.heads + s.head) * 128 + threadIdx.x]);
    error = static_cast<float>(fabs(got - y) / (1.05 / 256 * (size + fabs(y)) + 1e-5));
    if (!(error >= 0)) error = INFINITY;
  }
  shared[threadIdx.x] = error;
  for (int i = 128; i > 0; i /= 2) {
    __syncthreads();
    if (threadIdx.x < i) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + i]);
  }
  if (threadIdx.x == 0) {
    float lse = fabsf(p.lse[std::size_t(s.head) * p.total_q + row] - (highest + logf(sum))) / 1e-4f;
    if (!(lse >= 0)) lse = INFINITY;
    worst[blockIdx.x] = fmaxf(shared[0], lse);
  }
}

struct Row {
  int batch, len_q, len_k, heads, causal;
};

std::vector<Row> rows() {
  std::vector<Row> all;
  for (const int heads : {128, 16}) {
    for (const int n : {1024, 2048, 4096, 8192, 16384}) {
      all.push_back({1, n, n, heads, 1});
      if (n < 16384) all.push_back({16384 / n, n, n, heads, 1});
    }
    all.push_back({1, 2048, 16384, heads, 1});
    all.push_back({1, 4096, 4096, heads, 0});
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace flash_mla;
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s OUT.json [--reps N] [--rows A:B] [--check-only]\n", argv[0]);
    return 2;
  }
  int reps = 30, begin = 0, end = 1 << 30;
  bool check_only = false;
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--check-only") == 0) {
      check_only = true;
    } else if (std::strcmp(argv[i], "--reps") == 0 && i + 1 < argc) {
      reps = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--rows") == 0 && i + 1 < argc) {
      std::sscanf(argv[++i], "%d:%d", &begin, &end);
    }
  }
  std::ofstream json(argv[1]);
  json << "{\"rows\": [";
  constexpr std::size_t kFlush = 256u << 20;
  DeviceMemory flush(kFlush), sink(16);
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
    const std::int64_t h = row.heads, nq = std::int64_t{row.batch} * row.len_q,
                       nk = std::int64_t{row.batch} * row.len_k;
    const auto bytes = [](std::int64_t n) { return static_cast<std::size_t>(n) * 2; };
    DeviceMemory q(bytes(nq * h * 192)), kv(bytes(nk * h * 256)), latent(bytes(nk * 576)),
        out(bytes(nq * h * 128)), lse(static_cast<std::size_t>(nq * h) * 4),
        workspace(sm90::dense_prefill_workspace_size()), offsets_q(4 * (row.batch + 1ull)),
        offsets_k(4 * (row.batch + 1ull));
    std::uint64_t seed = 1000 + 3 * static_cast<std::uint64_t>(r);
    for (DeviceMemory* m : {&q, &kv, &latent})
      fill_normal<<<1024, 256>>>(m->as<__nv_bfloat16>(), m->bytes() / 2, seed++);
    out.poison();
    lse.poison();
    workspace.poison();
    std::vector<int> at_q, at_k;
    for (int i = 0; i <= row.batch; ++i) {
      at_q.push_back(i * row.len_q);
      at_k.push_back(i * row.len_k);
    }
    offsets_q.upload(at_q.data(), at_q.size() * 4);
    offsets_k.upload(at_k.data(), at_k.size() * 4);

    constexpr DType kType = DType::kBFloat16;
    sm90::DensePrefillArgs args;
    args.q = TensorView::contiguous(q.as<void>(), kType, {nq, h, 192}, kGpu);
    args.k_nope = TensorView::contiguous(kv.as<void>(), kType, {nk, h, 128}, kGpu);
    args.k_nope.strides = {h * 256, 256, 1};
    args.v = args.k_nope;
    args.v.data = kv.as<__nv_bfloat16>() + 128;
    args.k_rope = TensorView::contiguous(latent.as<__nv_bfloat16>() + 512, kType, {nk, 64}, kGpu);
    args.k_rope.strides[0] = 576;
    args.out = TensorView::contiguous(out.as<void>(), kType, {nq, h, 128}, kGpu);
    args.lse = TensorView::contiguous(lse.as<void>(), DType::kFloat32, {h, nq}, kGpu);
    args.cu_seqlens_q = TensorView::contiguous(offsets_q.as<void>(), DType::kInt32, {row.batch + 1}, kGpu);
    args.cu_seqlens_k = TensorView::contiguous(offsets_k.as<void>(), DType::kInt32, {row.batch + 1}, kGpu);
    check(cudaDeviceSynchronize(), "fill");
    const auto call = [&] {
      sm90::dense_prefill(args, kScale, row.causal != 0, workspace.as<void>(), stream);
    };
    call();
    check(cudaStreamSynchronize(stream), "dense_prefill");

    constexpr int kSamples = 64;
    std::mt19937 rng(static_cast<unsigned>(r) + 1);
    std::vector<Sample> samples;
    for (int i = 0; i < kSamples; ++i) {
      samples.push_back({static_cast<int>(rng() % static_cast<unsigned>(row.batch)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.len_q)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.heads))});
    }
    DeviceMemory d_samples(samples.size() * sizeof(Sample)), d_worst(kSamples * 4), nans(8),
        scores(static_cast<std::size_t>(kSamples) * static_cast<std::size_t>(row.len_k) * 4);
    d_samples.upload(samples.data(), samples.size() * sizeof(Sample));
    const Problem problem{q.as<__nv_bfloat16>(),
                          kv.as<__nv_bfloat16>(),
                          latent.as<__nv_bfloat16>(),
                          out.as<__nv_bfloat16>(),
                          lse.as<float>(),
                          row.heads,
                          row.len_q,
                          row.len_k,
                          row.causal,
                          static_cast<int>(nq)};
    check_rows<<<kSamples, 256>>>(problem, d_samples.as<Sample>(), scores.as<float>(), d_worst.as<float>());
    check(cudaMemset(nans.as<void>(), 0, 8), "cudaMemset");
    count_nan<<<1024, 256>>>(out.as<__nv_bfloat16>(), out.bytes() / 2, nans.as<unsigned long long>());
    const std::vector<float> errors = d_worst.download<float>();
    const float worst = *std::max_element(errors.begin(), errors.end());
    const bool good = worst <= 1 && nans.download<unsigned long long>()[0] == 0;
    failed += !good;

    double ms = 0;
    if (!check_only) {
      std::vector<float> times;
      for (int i = 0; i < reps + 3; ++i) {
        read_pass<<<528, 512, 0, stream>>>(flush.as<uint4>(), kFlush / 16, sink.as<std::uint32_t>());
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
    double pairs = double(row.len_q) * row.len_k;
    if (row.causal) pairs -= double(row.len_q) * (row.len_q - 1) / 2;
    const double tflops = ms > 0 ? 2.0 * row.heads * row.batch * pairs * 320 / ms / 1e9 : 0;
    std::printf("%2d b%-2d q%-5d k%-5d h%-3d c%d %s %.2f | %8.4f ms %4.0f TFLOP/s\n", r, row.batch, row.len_q,
                row.len_k, row.heads, row.causal, good ? "ok" : "FAIL", worst, ms, tflops);
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"b\":" << row.batch << ",\"s_q\":" << row.len_q
         << ",\"s_k\":" << row.len_k << ",\"h\":" << row.heads << ",\"causal\":" << row.causal
         << ",\"dtype\":\"bf16\",\"ms\":" << ms << ",\"tflops\":" << tflops
         << ",\"correct\":" << (good ? "true" : "false") << "}";
  }
  json << "\n]}\n";
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
