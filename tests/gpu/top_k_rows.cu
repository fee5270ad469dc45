// Times of top_k on a GPU, row by row of a table, each beside a check against the CPU's.
//
//   top_k_rows FILE.json [--reps N]

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "base/cuda/check.h"
#include "flash_mla/top_k.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla;

struct Case {
  const char* scores;
  int rows, width, k;
};

constexpr Case kCases[] = {
    {"normal", 1, 131072, 2048},    {"normal", 8, 131072, 2048},   {"normal", 32, 131072, 2048},
    {"normal", 64, 131072, 2048},   {"normal", 128, 131072, 2048}, {"relu", 128, 131072, 2048},
    {"few", 128, 131072, 2048},     {"equal", 128, 131072, 2048},  {"normal", 128, 8192, 2048},
    {"normal", 128, 32768, 2048},   {"normal", 128, 131072, 512},  {"normal", 128, 131072, 4096},
    {"normal", 1, 1048576, 2048},   {"normal", 4096, 8192, 2048},  {"normal", 4096, 32768, 2048},
    {"normal", 4096, 131072, 2048}, {"relu", 4096, 131072, 2048},
};

/// Scores of `count` different rows, of which the call's rows are copies in turn.
std::vector<float> make_rows(const Case& c, int count, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<std::size_t>(count) * static_cast<std::size_t>(c.width));
  const std::string kind = c.scores;
  for (float& x : rows) {
    x = normal(rng);
    if (kind == "relu") x = std::max(x - 1.0f, 0.0f);  // 16 % above zero
    if (kind == "few") x = std::max(x - 3.0f, 0.0f);   // 0.1 %: the rest of k are ties at zero
    if (kind == "equal") x = 0.5f;
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "top_k_rows.json";
  const int reps = argc > 3 && std::strcmp(argv[2], "--reps") == 0 ? std::stoi(argv[3]) : 30;
  const Device gpu{DeviceType::kCuda, 0};
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaEvent_t before = nullptr, after = nullptr;
  check(cudaEventCreate(&before), "cudaEventCreate");
  check(cudaEventCreate(&after), "cudaEventCreate");
  constexpr std::size_t kFlush = std::size_t{256} << 20;
  char* flush = nullptr;
  std::uint32_t* sink = nullptr;
  check(cudaMalloc(&flush, kFlush), "cudaMalloc");
  check(cudaMalloc(&sink, 4), "cudaMalloc");
  check(cudaMemset(flush, 1, kFlush), "cudaMemset");
  std::ofstream json(path);
  json << "{\"reps\":" << reps << ",\"rows\":[";
  int done = 0, failed = 0;
  for (const Case& c : kCases) {
    const int different = std::min(c.rows, 16);
    const std::vector<float> some = make_rows(c, different, 77 + static_cast<unsigned>(done));
    const std::size_t bytes =
        sizeof(float) * static_cast<std::size_t>(c.rows) * static_cast<std::size_t>(c.width);
    float* logits = nullptr;
    int *lengths = nullptr, *indices = nullptr;
    const std::size_t out_ints = static_cast<std::size_t>(c.rows) * static_cast<std::size_t>(c.k);
    check(cudaMalloc(&logits, bytes), "cudaMalloc");
    check(cudaMalloc(&lengths, sizeof(int) * static_cast<std::size_t>(c.rows)), "cudaMalloc");
    check(cudaMalloc(&indices, sizeof(int) * out_ints), "cudaMalloc");
    for (int row = 0; row < c.rows; ++row) {
      check(cudaMemcpy(logits + static_cast<std::size_t>(row) * c.width,
                       some.data() + static_cast<std::size_t>(row % different) * c.width,
                       sizeof(float) * static_cast<std::size_t>(c.width), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    }
    const std::vector<int> all(static_cast<std::size_t>(c.rows), c.width);
    check(cudaMemcpy(lengths, all.data(), sizeof(int) * all.size(), cudaMemcpyHostToDevice), "cudaMemcpy");
    check(cudaMemset(indices, 0x7F, sizeof(int) * out_ints), "cudaMemset");
    TopKArgs args;
    args.logits = TensorView::contiguous(logits, DType::kFloat32, {c.rows, c.width}, gpu);
    args.lengths = TensorView::contiguous(lengths, DType::kInt32, {c.rows}, gpu);
    args.indices = TensorView::contiguous(indices, DType::kInt32, {c.rows, c.k}, gpu);
    const auto call = [&] { top_k(args, nullptr, 0, {.stream = stream}); };
    call();
    check(cudaStreamSynchronize(stream), "top_k");
    std::vector<int> got(out_ints), want(static_cast<std::size_t>(different) * static_cast<std::size_t>(c.k));
    check(cudaMemcpy(got.data(), indices, sizeof(int) * out_ints, cudaMemcpyDeviceToHost), "cudaMemcpy");
    TopKArgs host;
    host.logits =
        TensorView::contiguous(const_cast<float*>(some.data()), DType::kFloat32, {different, c.width});
    host.lengths = TensorView::contiguous(const_cast<int*>(all.data()), DType::kInt32, {different});
    host.indices = TensorView::contiguous(want.data(), DType::kInt32, {different, c.k});
    top_k(host, nullptr, 0);
    int wrong = 0;
    for (int row = 0; row < c.rows; ++row) {
      wrong += !std::equal(got.begin() + static_cast<std::ptrdiff_t>(row) * c.k,
                           got.begin() + static_cast<std::ptrdiff_t>(row + 1) * c.k,
                           want.begin() + static_cast<std::ptrdiff_t>(row % different) * c.k);
    }
    failed += wrong > 0;
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
    const double floor = static_cast<double>(bytes) / 4.65e6;
    std::printf("%-7s %5d x %7d k %4d %s | %8.2f us, floor %7.2f\n", c.scores, c.rows, c.width, c.k,
                wrong == 0 ? "ok" : "FAIL", us, floor);
    std::fflush(stdout);
    json << (done++ > 0 ? ",\n" : "\n") << "{\"scores\":\"" << c.scores << "\",\"rows\":" << c.rows
         << ",\"width\":" << c.width << ",\"k\":" << c.k << ",\"us\":" << us << ",\"floor_us\":" << floor
         << ",\"correct\":" << (wrong == 0 ? "true" : "false") << "}";
    check(cudaFree(logits), "cudaFree");
    check(cudaFree(lengths), "cudaFree");
    check(cudaFree(indices), "cudaFree");
  }
  json << "\n]}\n";
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
