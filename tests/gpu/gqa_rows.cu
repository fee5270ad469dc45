// Times gqa_attention on a GPU, beside a check.
//
//   gqa_rows OUT.json [--reps N] [--rows A:B]
//
// Protocol: random data; every timed call follows a read pass over 256 MiB (cold L2) and is queued behind a spin kernel, so
// that the host is ahead; events around the call; median. Schedules are made before, combining is counted. GB/s count q, out
// and every key and value once, and stand beside the rate of a kernel that only reads, over 4 GiB, in the same process.
// Sampled rows of every shape are checked against float32.

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
#include <vector>

#include "device.h"
#include "flash_mla/gqa.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla;
using flash_mla::gpu_test::DeviceMemory;
constexpr Device kGpu{DeviceType::kCuda, 0};

__global__ void fill(__nv_bfloat16* p, std::size_t n, std::uint32_t seed) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    std::uint32_t x =
        static_cast<std::uint32_t>(i) * 2654435761u ^ static_cast<std::uint32_t>(i >> 32) ^ seed;
    x ^= x >> 15;
    x *= 0x2c1b3c6du;
    x ^= x >> 12;
    x *= 0x297a2d39u;
    x ^= x >> 15;
    p[i] = __float2bfloat16((static_cast<float>(x) * 2.3283064e-10f - 0.5f) * 3.4f);  // of variance 1
  }
}

struct Row {
  int batch, len_q, len_k, h_q, h_kv, d, page_size, split;  ///< split 0: no schedule
};

/// Sequences of one length; page i of sequence r is page r * pages + pages - 1 - i.
struct Problem {
  const __nv_bfloat16 *q, *k, *v, *out;
  Row row;
};
struct Sample {
  int seq, query, head;
};

/// One block a sample: the row's largest error over its bound.
__global__ void __launch_bounds__(256)
    check_rows(Problem p, const Sample* samples, float* scores, float* worst) {
  const Sample s = samples[blockIdx.x];
  const Row& r = p.row;
  const int pages = (r.len_k + r.page_size - 1) / r.page_size, kv_head = s.head / (r.h_q / r.h_kv);
  const int visible = r.len_k - r.len_q + s.query + 1;
  const std::size_t query = (std::size_t(s.seq) * r.len_q + s.query) * r.h_q + s.head;
  float* score = scores + std::size_t(blockIdx.x) * r.len_k;
  const auto token = [&](int j) {
    const std::size_t page = std::size_t(s.seq) * pages + pages - 1 - j / r.page_size;
    return ((page * r.page_size + j % r.page_size) * r.h_kv + kv_head) * r.d;
  };
  __shared__ float shared[256];
  const auto reduce = [&](float x, auto f) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int i = 128; i > 0; i /= 2) {
      if (threadIdx.x < i) shared[threadIdx.x] = f(shared[threadIdx.x], shared[threadIdx.x + i]);
      __syncthreads();
    }
    const float y = shared[0];
    __syncthreads();
    return y;
  };
  const auto most = [](float a, float b) { return fmaxf(a, b); };
  float highest = -INFINITY;
  for (int j = threadIdx.x; j < visible; j += 256) {
    float x = 0;
    for (int d = 0; d < r.d; ++d)
      x += __bfloat162float(p.q[query * r.d + d]) * __bfloat162float(p.k[token(j) + d]);
    score[j] = x * rsqrtf(static_cast<float>(r.d));
    highest = fmaxf(highest, score[j]);
  }
  highest = reduce(highest, most);
  float total = 0;
  for (int j = threadIdx.x; j < visible; j += 256) {
    score[j] = expf(score[j] - highest);
    total += score[j];
  }
  total = reduce(total, [](float a, float b) { return a + b; });
  float error = 0;
  for (int d = threadIdx.x; d < r.d; d += 256) {
    float y = 0, size = 0;
    for (int j = 0; j < visible; ++j) {
      const float x = score[j] / total * __bfloat162float(p.v[token(j) + d]);
      y += x;
      size += fabsf(x);
    }
    const float got = __bfloat162float(p.out[query * r.d + d]);
    const float e = fabsf(got - y) / (1.05f / 256 * (size + fabsf(y)) + 3e-5f);
    error = fmaxf(error, e == e ? e : INFINITY);
  }
  error = reduce(error, most);
  if (threadIdx.x == 0) worst[blockIdx.x] = error;
}

std::vector<Row> rows() {
  std::vector<Row> all;
  for (const int batch : {128, 32, 8, 1}) {
    for (const int len : {1024, 8192}) all.push_back({batch, 1, len, 32, 8, 128, 64, 1});
  }
  all.push_back({128, 1, 8192, 64, 8, 128, 64, 1});
  all.push_back({128, 1, 8192, 8, 8, 128, 64, 1});
  all.push_back({128, 1, 8192, 128, 8, 128, 64, 1});
  all.push_back({128, 1, 8192, 32, 8, 128, 16, 1});
  all.push_back({128, 1, 8192, 32, 8, 128, 1, 1});
  all.push_back({128, 1, 8192, 64, 8, 64, 64, 1});
  all.push_back({128, 1, 8192, 16, 4, 256, 64, 1});
  all.push_back({128, 1, 8192, 32, 8, 128, 64, 0});
  all.push_back({128, 2, 8192, 32, 8, 128, 64, 1});
  all.push_back({1, 1, 32768, 32, 8, 128, 64, 1});
  all.push_back({1, 1, 131072, 64, 8, 128, 64, 1});
  all.push_back({8, 128, 8192, 32, 8, 128, 64, 0});
  for (const int len : {1024, 2048, 4096, 8192, 16384}) all.push_back({1, len, len, 32, 8, 128, 64, 0});
  all.push_back({8, 2048, 2048, 32, 8, 128, 64, 0});
  all.push_back({1, 8192, 8192, 32, 8, 128, 128, 0});
  all.push_back({1, 8192, 8192, 32, 8, 128, 16, 0});
  all.push_back({1, 8192, 8192, 32, 32, 128, 64, 0});
  all.push_back({1, 2048, 16384, 32, 8, 128, 64, 0});
  all.push_back({1, 128, 131072, 16, 16, 128, 64, 0});
  all.push_back({1, 128, 32768, 32, 8, 128, 64, 0});
  all.push_back({32, 16, 8192, 32, 8, 128, 64, 0});
  all.push_back({32, 16, 8192, 32, 8, 128, 64, 1});
  all.push_back({1, 8192, 8192, 64, 8, 64, 64, 0});
  all.push_back({1, 8192, 8192, 16, 4, 256, 64, 0});
  return all;
}

double median_ms(std::vector<float>& times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: gqa_rows OUT.json [--reps N] [--rows A:B]\n"), 2;
  int reps = 30, begin = 0, end = 1 << 30;
  for (int i = 2; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--reps") == 0) reps = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--rows") == 0) std::sscanf(argv[i + 1], "%d:%d", &begin, &end);
  }
  constexpr std::size_t kFlush = 256u << 20, kStream = std::size_t{4} << 30;
  DeviceMemory flush(kFlush), sink(16);
  flush.poison();
  cudaStream_t stream = nullptr;
  cudaEvent_t before = nullptr, after = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(cudaEventCreate(&before), "cudaEventCreate");
  check(cudaEventCreate(&after), "cudaEventCreate");
  const auto timed = [&](const auto& call) {
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
    return median_ms(times);
  };
  double stream_gbps = 0;
  {
    DeviceMemory big(kStream);
    big.poison();
    const double ms = timed([&] {
      read_pass<<<132 * 8, 512, 0, stream>>>(big.as<uint4>(), kStream / 16, sink.as<std::uint32_t>());
    });
    stream_gbps = static_cast<double>(kStream) / ms / 1e6;
    std::printf("read stream %.0f GB/s\n", stream_gbps);
  }
  std::ofstream json(argv[1]);
  json << "{\"read_gbps\":" << stream_gbps << ",\"rows\":[";
  int failed = 0, done = 0;
  const std::vector<Row> all = rows();
  for (int r = begin; r < std::min(end, static_cast<int>(all.size())); ++r) {
    const Row& row = all[static_cast<std::size_t>(r)];
    const std::int64_t b = row.batch, pages = (row.len_k + row.page_size - 1) / row.page_size;
    const std::int64_t total_q = b * row.len_q;
    const auto bytes = [](std::int64_t n) { return static_cast<std::size_t>(n) * 2; };
    const std::int64_t pool = b * pages * row.page_size * row.h_kv * row.d;
    DeviceMemory q(bytes(total_q * row.h_q * row.d)), k(bytes(pool)), v(bytes(pool)), out(q.bytes()),
        lengths(static_cast<std::size_t>(b) * 4), table(static_cast<std::size_t>(b * pages) * 4);
    std::uint32_t seed = 100 + 3 * static_cast<std::uint32_t>(r);
    for (DeviceMemory* m : {&q, &k, &v}) fill<<<2048, 256>>>(m->as<__nv_bfloat16>(), m->bytes() / 2, seed++);
    out.poison();
    const std::vector<std::int32_t> lens(static_cast<std::size_t>(b), row.len_k);
    std::vector<std::int32_t> entries;
    for (std::int64_t i = 0; i < b; ++i) {
      for (std::int64_t j = 0; j < pages; ++j)
        entries.push_back(static_cast<std::int32_t>(i * pages + pages - 1 - j));
    }
    lengths.upload(lens.data(), lens.size() * 4);
    table.upload(entries.data(), entries.size() * 4);
    GqaArgs args;
    args.q = TensorView::contiguous(q.as<void>(), DType::kBFloat16, {total_q, row.h_q, row.d}, kGpu);
    args.k = TensorView::contiguous(k.as<void>(), DType::kBFloat16,
                                    {b * pages, row.page_size, row.h_kv, row.d}, kGpu);
    args.v = args.k;
    args.v.data = v.as<void>();
    args.seqlens_k = TensorView::contiguous(lengths.as<void>(), DType::kInt32, {b}, kGpu);
    args.block_table = TensorView::contiguous(table.as<void>(), DType::kInt32, {b, pages}, kGpu);
    args.out = TensorView::contiguous(out.as<void>(), DType::kBFloat16, {total_q, row.h_q, row.d}, kGpu);
    GqaOptions options;
    options.causal = true;
    options.stream = stream;
    const ScheduleOptions plan_options = gqa_schedule_options(0, row.len_q, row.h_q, row.h_kv, row.d);
    DeviceMemory parts(static_cast<std::size_t>(plan_options.num_parts) * 32),
        splits((static_cast<std::size_t>(b) + 1) * 4);
    DecodeScheduleView schedule;
    if (row.split != 0) {
      schedule.parts =
          TensorView::contiguous(parts.as<void>(), DType::kInt32, {plan_options.num_parts, 8}, kGpu);
      schedule.num_splits = TensorView::contiguous(splits.as<void>(), DType::kInt32, {b + 1}, kGpu);
      build_decode_schedule(args.seqlens_k, plan_options, schedule, stream);
    }
    const std::size_t needed = gqa_workspace_size(args, schedule, options);
    DeviceMemory workspace(needed);
    workspace.poison();
    check(cudaDeviceSynchronize(), "fill");
    const auto call = [&] { gqa_attention(args, schedule, workspace.as<void>(), needed, options); };
    call();
    check(cudaStreamSynchronize(stream), "gqa_attention");

    constexpr int kSamples = 64;
    std::mt19937 rng(static_cast<unsigned>(r) + 1);
    std::vector<Sample> samples;
    for (int i = 0; i < kSamples; ++i) {
      samples.push_back({static_cast<int>(rng() % static_cast<unsigned>(row.batch)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.len_q)),
                         static_cast<int>(rng() % static_cast<unsigned>(row.h_q))});
    }
    DeviceMemory d_samples(samples.size() * sizeof(Sample)), d_worst(kSamples * 4),
        scores(static_cast<std::size_t>(kSamples) * static_cast<std::size_t>(row.len_k) * 4);
    d_samples.upload(samples.data(), samples.size() * sizeof(Sample));
    const Problem problem{q.as<__nv_bfloat16>(), k.as<__nv_bfloat16>(), v.as<__nv_bfloat16>(),
                          out.as<__nv_bfloat16>(), row};
    check_rows<<<kSamples, 256>>>(problem, d_samples.as<Sample>(), scores.as<float>(), d_worst.as<float>());
    const std::vector<float> errors = d_worst.download<float>();
    const float worst = *std::max_element(errors.begin(), errors.end());
    failed += !(worst <= 1);

    const double ms = timed(call);
    const double read = 2.0 * static_cast<double>(b) * row.len_k * row.h_kv * row.d * 2 +
                        4.0 * static_cast<double>(total_q) * row.h_q * row.d;
    const double gbps = read / ms / 1e6;
    double pairs =
        static_cast<double>(row.len_q) * row.len_k - static_cast<double>(row.len_q) * (row.len_q - 1) / 2;
    const double tflops = 4.0 * row.h_q * static_cast<double>(b) * pairs * row.d / ms / 1e9;
    std::printf(
        "%2d b%-3d q%-4d k%-6d h%d/%d d%-3d page %-2d parts %-3d %s %.2f | %9.4f ms %5.0f GB/s = %.3f of the stream, %4.0f TFLOP/s\n",
        r, row.batch, row.len_q, row.len_k, row.h_q, row.h_kv, row.d, row.page_size,
        row.split != 0 ? plan_options.num_parts : 0, worst <= 1 ? "ok" : "FAIL", worst, ms, gbps,
        gbps / stream_gbps, tflops);
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"b\":" << row.batch << ",\"s_q\":" << row.len_q
         << ",\"s_k\":" << row.len_k << ",\"h_q\":" << row.h_q << ",\"h_kv\":" << row.h_kv
         << ",\"d\":" << row.d << ",\"page_size\":" << row.page_size
         << ",\"scheduled\":" << (row.split != 0 ? "true" : "false") << ",\"ms\":" << ms
         << ",\"gbps\":" << gbps << ",\"tflops\":" << tflops
         << ",\"correct\":" << (worst <= 1 ? "true" : "false") << "}";
  }
  json << "\n]}\n";
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
