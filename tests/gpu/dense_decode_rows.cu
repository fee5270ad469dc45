// Checks and times dense decode on a GPU over the shapes of a CSV file (b, s_q, h_q, mean_s_k, varlen,
// causal, ..., best_ms, floor_ms), through the C++ API of the sm90 backend.
//
//   dense_decode_rows FILE.csv OUT.json [--check-only] [--rows A:B] [--reps N] [--overhead BLOCKS]
//
// Protocol: random data; every timed launch follows a read pass over 256 MiB (cold L2) and is queued behind a
// spin kernel, so that the host is ahead; events around the launch; median. A sample of rows of every shape
// is checked against an fp32 reference in the same process.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "sm90/dense_decode.h"

namespace {

#define CHECK(x)                                                                              \
  do {                                                                                        \
    const cudaError_t e = (x);                                                                \
    if (e != cudaSuccess) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e)); \
      std::exit(2);                                                                           \
    }                                                                                         \
  } while (0)

__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  x ^= x >> 33;
  return static_cast<std::uint32_t>(x);
}

__global__ void fill_normal(__nv_bfloat16* p, std::size_t n, std::uint64_t seed, float scale) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    const float u = (mix(seed * 0x9E3779B97F4A7C15ull + 2 * i) + 1.0f) * 2.3283064e-10f;
    const float v = mix(seed * 0x9E3779B97F4A7C15ull + 2 * i + 1) * 2.3283064e-10f;
    const float x = sqrtf(-2.0f * logf(fmaxf(u, 1e-10f))) * cospif(2.0f * v) * scale;
    p[i] = __float2bfloat16(fminf(fmaxf(x, -1.0f), 1.0f));
  }
}

__global__ void read_pass(const uint4* p, std::size_t n, std::uint32_t* sink) {
  std::uint32_t x = 0;
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    const uint4 v = p[i];
    x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (x == 0x12345678u) *sink = x;
}

__global__ void spin(long long cycles) {
  const long long start = clock64();
  while (clock64() - start < cycles) {
  }
}

struct Sample {
  int req, token, head;
};

// One block per sampled row; two passes over the keys, scores in global scratch.
__global__ void reference_rows(const __nv_bfloat16* q, const __nv_bfloat16* k, const int* table,
                               int max_blocks, const int* lengths, const Sample* samples, int s_q, int h_q,
                               float scale, int causal, float* scratch, int scratch_stride, float* out,
                               float* lse) {
  const Sample s = samples[blockIdx.x];
  const int length = lengths[s.req];
  const int visible = causal ? max(length - s_q + s.token + 1, 0) : length;
  float* score = scratch + std::size_t(blockIdx.x) * scratch_stride;
  __shared__ float query[576];
  __shared__ float shared[256];
  for (int d = threadIdx.x; d < 576; d += blockDim.x) {
    query[d] = __bfloat162float(q[((std::size_t(s.req) * s_q + s.token) * h_q + s.head) * 576 + d]);
  }
  __syncthreads();
  float highest = -INFINITY;
  for (int j = threadIdx.x; j < visible; j += blockDim.x) {
    const __nv_bfloat16* key =
        k + (std::size_t(table[std::size_t(s.req) * max_blocks + j / 64]) * 64 + j % 64) * 576;
    float x = 0;
    for (int d = 0; d < 576; ++d) x += query[d] * __bfloat162float(key[d]);
    score[j] = x * scale;
    highest = fmaxf(highest, x * scale);
  }
  shared[threadIdx.x] = highest;
  __syncthreads();
  for (int i = 128; i > 0; i /= 2) {
    if (threadIdx.x < i) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + i]);
    __syncthreads();
  }
  highest = shared[0];
  __syncthreads();
  float sum = 0;
  for (int j = threadIdx.x; j < visible; j += blockDim.x) sum += expf(score[j] - highest);
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int i = 128; i > 0; i /= 2) {
    if (threadIdx.x < i) shared[threadIdx.x] += shared[threadIdx.x + i];
    __syncthreads();
  }
  sum = shared[0];
  for (int d = threadIdx.x; d < 512; d += blockDim.x) {
    float x = 0;
    for (int j = 0; j < visible; ++j) {
      x += expf(score[j] - highest) *
           __bfloat162float(
               k[(std::size_t(table[std::size_t(s.req) * max_blocks + j / 64]) * 64 + j % 64) * 576 + d]);
    }
    out[std::size_t(blockIdx.x) * 512 + d] = visible > 0 ? x / sum : 0.0f;
  }
  if (threadIdx.x == 0) lse[blockIdx.x] = visible > 0 ? highest + logf(sum) : INFINITY;
}

template <class T>
T* device_alloc(std::size_t n) {
  T* p = nullptr;
  CHECK(cudaMalloc(&p, std::max<std::size_t>(n * sizeof(T), 256)));
  return p;
}

struct Row {
  int b, s_q, h_q, mean, varlen, causal;
  double best_ms, floor_ms;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr,
                 "usage: %s FILE.csv OUT.json [--check-only] [--rows A:B] [--reps N] [--overhead BLOCKS]\n",
                 argv[0]);
    return 2;
  }
  bool check_only = false;
  int begin = 0, end = 1 << 30, reps = 30, overhead = -1;
  for (int i = 3; i < argc; ++i) {
    if (std::strcmp(argv[i], "--check-only") == 0) {
      check_only = true;
    } else if (std::strcmp(argv[i], "--rows") == 0 && i + 1 < argc) {
      std::sscanf(argv[++i], "%d:%d", &begin, &end);
    } else if (std::strcmp(argv[i], "--reps") == 0 && i + 1 < argc) {
      reps = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--overhead") == 0 && i + 1 < argc) {
      overhead = std::atoi(argv[++i]);
    }
  }
  std::vector<Row> rows;
  std::ifstream in(argv[1]);
  std::string line;
  std::getline(in, line);
  while (std::getline(in, line)) {
    std::vector<std::string> f;
    std::stringstream ss(line);
    for (std::string x; std::getline(ss, x, ',');) f.push_back(x);
    rows.push_back({std::stoi(f[0]), std::stoi(f[1]), std::stoi(f[2]), std::stoi(f[3]), std::stoi(f[4]),
                    std::stoi(f[5]), std::stod(f[9]), std::stod(f[10])});
  }
  using namespace flash_mla;
  std::ofstream json(argv[2]);
  json << "{\"rows\": [\n";
  uint4* flush = device_alloc<uint4>((256u << 20) / 16);
  CHECK(cudaMemset(flush, 1, 256u << 20));
  auto* sink = device_alloc<std::uint32_t>(1);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  cudaEvent_t e0, e1;
  CHECK(cudaEventCreate(&e0));
  CHECK(cudaEventCreate(&e1));
  double log_best = 0, log_floor = 0;
  int timed = 0, failed = 0, over = 0;
  for (int r = begin; r < std::min<int>(end, static_cast<int>(rows.size())); ++r) {
    const Row& row = rows[static_cast<std::size_t>(r)];
    std::mt19937 rng(static_cast<unsigned>(r) + 1);
    std::vector<int> lengths(static_cast<std::size_t>(row.b), row.mean);
    if (row.varlen) {
      std::normal_distribution<double> normal(row.mean, row.mean / 2.0);
      for (int& x : lengths) x = std::max(static_cast<int>(normal(rng)), row.s_q);
    }
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    const int max_blocks = (longest + 63) / 64;
    std::size_t pages = 0;
    for (const int x : lengths) pages += static_cast<std::size_t>((x + 63) / 64);
    std::vector<int> order(pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    std::vector<int> table(static_cast<std::size_t>(row.b) * max_blocks, 2147480000);
    std::size_t next = 0;
    for (int i = 0; i < row.b; ++i) {
      for (int j = 0; j < (lengths[static_cast<std::size_t>(i)] + 63) / 64; ++j) {
        table[static_cast<std::size_t>(i) * max_blocks + j] = order[next++];
      }
    }
    const std::size_t nq = static_cast<std::size_t>(row.b) * row.s_q * row.h_q;
    auto* q = device_alloc<__nv_bfloat16>(nq * 576);
    auto* k = device_alloc<__nv_bfloat16>(pages * 64 * 576);
    auto* out = device_alloc<__nv_bfloat16>(nq * 512);
    auto* lse = device_alloc<float>(nq);
    auto* d_table = device_alloc<int>(table.size());
    auto* d_lengths = device_alloc<int>(lengths.size());
    fill_normal<<<1024, 256>>>(q, nq * 576, 2 * r + 1, 1.0f);
    fill_normal<<<1024, 256>>>(k, pages * 64 * 576, 2 * r + 2, 1.0f);
    // Slots past the end of each request hold NaN.
    for (int i = 0; i < row.b; ++i) {
      const int length = lengths[static_cast<std::size_t>(i)], tail = length % 64;
      if (tail != 0) {
        const int page = table[static_cast<std::size_t>(i) * max_blocks + length / 64];
        CHECK(
            cudaMemset(k + (static_cast<std::size_t>(page) * 64 + tail) * 576, 0xFF, (64 - tail) * 576 * 2));
      }
    }
    CHECK(cudaMemset(out, 0xFF, nq * 512 * 2));
    CHECK(cudaMemset(lse, 0xFF, nq * 4));
    CHECK(cudaMemcpy(d_table, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(d_lengths, lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice));

    const Device gpu{DeviceType::kCuda, 0};
    DenseDecodeArgs args;
    args.q = TensorView::contiguous(q, DType::kBFloat16, {row.b, row.s_q, row.h_q, 576}, gpu);
    args.k_cache =
        TensorView::contiguous(k, DType::kBFloat16, {static_cast<std::int64_t>(pages), 64, 1, 576}, gpu);
    args.block_table = TensorView::contiguous(d_table, DType::kInt32, {row.b, max_blocks}, gpu);
    args.cache_seqlens = TensorView::contiguous(d_lengths, DType::kInt32, {row.b}, gpu);
    args.out = TensorView::contiguous(out, DType::kBFloat16, {row.b, row.s_q, row.h_q, 512}, gpu);
    args.lse = TensorView::contiguous(lse, DType::kFloat32, {row.b, row.h_q, row.s_q}, gpu);
    ScheduleOptions options = cuda_schedule_options(0, row.s_q, row.h_q, 1, row.b);
    if (overhead >= 0) options.fixed_overhead_blocks = overhead;
    auto* parts = device_alloc<int>(static_cast<std::size_t>(options.num_parts) * 8);
    auto* splits = device_alloc<int>(static_cast<std::size_t>(row.b) + 1);
    DecodeScheduleView schedule;
    schedule.parts = TensorView::contiguous(parts, DType::kInt32, {options.num_parts, 8}, gpu);
    schedule.num_splits = TensorView::contiguous(splits, DType::kInt32, {row.b + 1}, gpu);
    sm90::check_supported(args, schedule);
    const std::size_t bytes = sm90::dense_decode_workspace_size(args, schedule);
    auto* workspace = device_alloc<std::byte>(bytes);
    CHECK(cudaMemset(workspace, 0xFF, bytes));
    const float scale = 0.1352338f;
    sm90::build_schedule(args.cache_seqlens, options, schedule, stream);
    sm90::dense_decode(args, schedule, workspace, scale, row.causal != 0, stream);
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaGetLastError());

    // Check a sample of rows.
    std::vector<Sample> samples;
    for (int i = 0; i < 48; ++i) {
      samples.push_back({static_cast<int>(rng() % static_cast<unsigned>(row.b)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.s_q)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.h_q))});
    }
    auto* d_samples = device_alloc<Sample>(samples.size());
    CHECK(cudaMemcpy(d_samples, samples.data(), samples.size() * sizeof(Sample), cudaMemcpyHostToDevice));
    auto* scratch = device_alloc<float>(samples.size() * static_cast<std::size_t>(longest));
    auto* ref = device_alloc<float>(samples.size() * 512);
    auto* ref_lse = device_alloc<float>(samples.size());
    reference_rows<<<static_cast<unsigned>(samples.size()), 256>>>(
        q, k, d_table, max_blocks, d_lengths, d_samples, row.s_q, row.h_q, scale, row.causal, scratch,
        longest, ref, ref_lse);
    std::vector<float> h_ref(samples.size() * 512), h_lse(samples.size()), got_lse(nq);
    std::vector<std::uint16_t> got(nq * 512);
    CHECK(cudaMemcpy(h_ref.data(), ref, h_ref.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(h_lse.data(), ref_lse, h_lse.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(got_lse.data(), lse, nq * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(got.data(), out, nq * 1024, cudaMemcpyDeviceToHost));
    double worst = 0, worst_lse = 0, dot = 0, norm = 0;
    for (std::size_t i = 0; i < samples.size(); ++i) {
      const Sample& s = samples[i];
      const std::size_t at = (static_cast<std::size_t>(s.req) * row.s_q + s.token) * row.h_q + s.head;
      for (std::size_t d = 0; d < 512; ++d) {
        const std::uint32_t bits = static_cast<std::uint32_t>(got[at * 512 + d]) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        const double y = h_ref[i * 512 + d];
        const double error = std::abs(x - y) / (8e-4 + std::abs(y) * 2.01 / 128);
        worst = std::isnan(error) ? 1e9 : std::max(worst, error);
        dot += x * y;
        norm += x * x + y * y;
      }
      const float x = got_lse[(static_cast<std::size_t>(s.req) * row.h_q + s.head) * row.s_q + s.token];
      const double error = std::isinf(x) && std::isinf(h_lse[i]) ? 0 : std::abs(x - h_lse[i]);
      worst_lse = std::isnan(error) ? 1e9 : std::max(worst_lse, error);
    }
    bool nan = false;
    for (const std::uint16_t x : got) nan = nan || (x & 0x7FFF) > 0x7F80;
    const double cosine = norm > 0 ? 1 - 2 * dot / norm : 0;
    const bool good = worst <= 1 && worst_lse < 1e-3 && cosine < 1e-5 && !nan;
    failed += !good;
    double median = 0;
    if (!check_only) {
      std::vector<float> times;
      for (int i = 0; i < reps + 3; ++i) {
        read_pass<<<528, 512, 0, stream>>>(flush, (256u << 20) / 16, sink);
        spin<<<1, 1, 0, stream>>>(40000);
        CHECK(cudaEventRecord(e0, stream));
        sm90::dense_decode(args, schedule, workspace, scale, row.causal != 0, stream);
        CHECK(cudaEventRecord(e1, stream));
        CHECK(cudaEventSynchronize(e1));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, e0, e1));
        if (i >= 3) times.push_back(ms);
      }
      std::sort(times.begin(), times.end());
      median = times[times.size() / 2];
    }
    double tokens = 0;
    for (const int x : lengths) tokens += x;
    const double tflops = 2.0 * row.h_q * row.s_q * tokens * 1088 / median / 1e9;
    const double gbs = (tokens * 576 + nq * 1088.0) * 2 / median / 1e6;
    if (!check_only) {
      log_best += std::log(median / row.best_ms);
      log_floor += std::log(median / row.floor_ms);
      over += median > row.best_ms;
      ++timed;
    }
    std::printf(
        "%2d b%-3d q%d h%-3d k%-6d v%d c%d %s %.2f | %.5f ms %.2f best %.2f floor %4.0f TF/s %4.0f GB/s\n", r,
        row.b, row.s_q, row.h_q, row.mean, row.varlen, row.causal, good ? "ok" : "FAIL", worst, median,
        median / row.best_ms, median / row.floor_ms, tflops, gbs);
    std::fflush(stdout);
    json << (timed > 1 ? ",\n" : "") << "{\"b\":" << row.b << ",\"s_q\":" << row.s_q << ",\"h_q\":" << row.h_q
         << ",\"h_kv\":1,\"s_k\":" << row.mean << ",\"varlen\":" << row.varlen << ",\"causal\":" << row.causal
         << ",\"dtype\":\"bf16\",\"ms\":" << median << ",\"gflops\":" << tflops * 1e3 << ",\"gbps\":" << gbs
         << ",\"best_ms\":" << row.best_ms << ",\"floor_ms\":" << row.floor_ms
         << ",\"correct\":" << (good ? "true" : "false") << "}";
    for (void* p : std::initializer_list<void*>{q, k, out, lse, d_table, d_lengths, parts, splits, workspace,
                                                d_samples, scratch, ref, ref_lse}) {
      CHECK(cudaFree(p));
    }
  }
  json << "\n]}\n";
  if (timed > 0) {
    std::printf("geometric mean: %.3f of best, %.3f of floor; %d of %d rows over best_ms\n",
                std::exp(log_best / timed), std::exp(log_floor / timed), over, timed);
  }
  std::printf("%d passed, %d failed\n", std::min<int>(end, static_cast<int>(rows.size())) - begin - failed,
              failed);
  return failed != 0;
}
