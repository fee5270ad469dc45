// all_reduce_norm on streams of one GPU that stand for ranks: checks, then times beside copies of as many bytes.
//
//   all_reduce_norm_rows [--quick]
//
// Every call's x is compared with the host's to the bit, normed to one unit of bfloat16, on all ranks; between calls some
// ranks are held up by a kernel that spins. "chain": calls back to back on all streams, time of one, with the launches of
// all ranks, which one GPU makes one after another; "inside": the same in one launch of each rank, as on GPUs of their
// own. The floor is a copy that reads and writes as many bytes as the ranks do together. Exit code 1 if anything differs.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/exchange/sm90/all_reduce_norm.h"
#include "protocol.cuh"

namespace {

using flash_mla::sm90::all_reduce_norm;
using flash_mla::sm90::AllReduceNorm;
using flash_mla::sm90::kMaxPeers;
using flash_mla::sm90::peer_flags;
using Values = std::vector<__nv_bfloat16>;

#define CHECK(x)                                                                              \
  do {                                                                                        \
    const cudaError_t e = (x);                                                                \
    if (e != cudaSuccess) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e)); \
      std::exit(2);                                                                           \
    }                                                                                         \
  } while (0)

constexpr float kEps = 1e-6f;

template <class T>
T* on_device(const std::vector<T>& values) {
  T* out = nullptr;
  CHECK(cudaMalloc(&out, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(out, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return out;
}

struct Ranks {
  Ranks(int size, std::int64_t num_rows, std::int64_t width, unsigned seed) : rows(num_rows), hidden(width) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const auto values = [&] {
      Values out(static_cast<std::size_t>(rows * hidden));
      for (auto& v : out) v = __float2bfloat16(normal(random));
      return out;
    };
    for (std::int64_t i = 0; i < hidden; ++i) weight.push_back(1 + 0.1f * normal(random));
    x = values();
    args.peers.size = size;
    args.rows = rows;
    args.hidden = hidden;
    args.eps = kEps;
    args.ctas = std::max(132 / size, 1);
    const std::vector<std::uint32_t> zeros(peer_flags(args.ctas) / 4, 0);
    for (int r = 0; r < size; ++r) {
      partials.push_back(values());
      args.partial[r] = on_device(partials.back());
      args.x[r] = on_device(x);
      args.normed[r] = on_device(x);
      args.peers.flags[r] = on_device(zeros);
      weights.push_back(on_device(weight));
      CHECK(cudaStreamCreateWithFlags(&streams[r], cudaStreamNonBlocking));
    }
  }
  ~Ranks() {
    for (int r = 0; r < args.peers.size; ++r) {
      cudaFree(const_cast<void*>(args.partial[r]));
      cudaFree(args.x[r]);
      cudaFree(args.normed[r]);
      cudaFree(args.peers.flags[r]);
      cudaFree(weights[static_cast<std::size_t>(r)]);
      cudaStreamDestroy(streams[r]);
    }
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  void call(int r) {
    AllReduceNorm own = args;
    own.peers.rank = r;
    own.weight = weights[static_cast<std::size_t>(r)];
    all_reduce_norm(own, streams[r]);
  }

  std::int64_t rows, hidden;
  AllReduceNorm args;
  std::vector<float> weight;
  std::vector<float*> weights;
  std::vector<Values> partials;
  Values x;
  cudaStream_t streams[kMaxPeers] = {};
};

int differences(Ranks& ranks) {
  Values normed(ranks.x.size()), got(ranks.x.size());
  for (std::int64_t t = 0; t < ranks.rows; ++t) {
    double squares = 0;
    const auto at = static_cast<std::size_t>(t * ranks.hidden);
    for (std::size_t i = at; i < at + static_cast<std::size_t>(ranks.hidden); ++i) {
      float sum = 0;
      for (const Values& partial : ranks.partials) sum += __bfloat162float(partial[i]);
      ranks.x[i] = __float2bfloat16(__bfloat162float(ranks.x[i]) + sum);
      const double stored = __bfloat162float(ranks.x[i]);
      squares += stored * stored;
    }
    const double factor = 1 / std::sqrt(squares / static_cast<double>(ranks.hidden) + kEps);
    for (std::size_t i = 0; i < static_cast<std::size_t>(ranks.hidden); ++i) {
      normed[at + i] =
          __float2bfloat16(static_cast<float>(__bfloat162float(ranks.x[at + i]) * factor * ranks.weight[i]));
    }
  }
  int wrong = 0;
  for (int r = 0; r < ranks.args.peers.size; ++r) {
    CHECK(cudaMemcpy(got.data(), ranks.args.x[r], got.size() * 2, cudaMemcpyDeviceToHost));
    wrong += std::memcmp(got.data(), ranks.x.data(), got.size() * 2) != 0;
    CHECK(cudaMemcpy(got.data(), ranks.args.normed[r], got.size() * 2, cudaMemcpyDeviceToHost));
    for (std::size_t i = 0; i < got.size(); ++i) {
      const float a = __bfloat162float(got[i]), b = __bfloat162float(normed[i]);
      if (!(std::abs(a - b) <= std::abs(b) / 128 + 1e-6f)) {
        ++wrong;
        break;
      }
    }
  }
  return wrong;
}

int check(int size, std::int64_t rows, std::int64_t hidden) {
  Ranks ranks(size, rows, hidden, static_cast<unsigned>(size * 100 + rows));
  std::mt19937 random(1);
  int wrong = 0;
  for (int call = 0; call < 12; ++call) {
    for (int r = 0; r < size; ++r) {
      if (random() % 3 == 0) spin<<<1, 1, 0, ranks.streams[r]>>>(static_cast<long long>(random() % 200'000));
    }
    for (int r = 0; r < size; ++r) ranks.call(r);
    CHECK(cudaDeviceSynchronize());
    wrong += differences(ranks);
  }
  std::printf("%d ranks, %4lld x %5lld: %s\n", size, static_cast<long long>(rows),
              static_cast<long long>(hidden), wrong == 0 ? "as on the host" : "DIFFERENT");
  return wrong;
}

// Microseconds of one of `count` calls of `queue` on all streams.
template <class F>
double time_chain(Ranks& ranks, int count, const F& queue) {
  cudaEvent_t begin, end, joined;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaEventCreateWithFlags(&joined, cudaEventDisableTiming));
  std::vector<double> times;
  for (int i = 0; i < 15; ++i) {
    spin<<<1, 1, 0, ranks.streams[0]>>>(2'000'000);  // the host is ahead
    CHECK(cudaEventRecord(begin, ranks.streams[0]));
    for (int r = 1; r < ranks.args.peers.size; ++r) CHECK(cudaStreamWaitEvent(ranks.streams[r], begin));
    for (int k = 0; k < count; ++k) queue();
    for (int r = 1; r < ranks.args.peers.size; ++r) {
      CHECK(cudaEventRecord(joined, ranks.streams[r]));
      CHECK(cudaStreamWaitEvent(ranks.streams[0], joined));
    }
    CHECK(cudaEventRecord(end, ranks.streams[0]));
    CHECK(cudaDeviceSynchronize());
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(1000.0 * ms / count);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaEventDestroy(joined));
  std::nth_element(times.begin(), times.begin() + 7, times.end());
  return times[7];
}

void time_shape(int size, std::int64_t rows, std::int64_t hidden) {
  Ranks ranks(size, rows, hidden, 7);
  const double mine = time_chain(ranks, 20, [&] {
    for (int r = 0; r < size; ++r) ranks.call(r);
  });
  constexpr int kRepeats = 200;
  ranks.args.repeats = kRepeats;
  const double inside = time_chain(ranks, 1, [&] {
    for (int r = 0; r < size; ++r) ranks.call(r);
  });
  // Read: all partial sums and x once. Written: x and normed of every rank.
  const std::size_t matrix = static_cast<std::size_t>(rows * hidden * 2);
  const std::size_t bytes =
      matrix * static_cast<std::size_t>(size + 1) + 2 * matrix * static_cast<std::size_t>(size);
  char *from = nullptr, *to = nullptr;
  CHECK(cudaMalloc(&from, bytes / 2));
  CHECK(cudaMalloc(&to, bytes / 2));
  const double copy = time_chain(ranks, 20, [&] {
    CHECK(cudaMemcpyAsync(to, from, bytes / 2, cudaMemcpyDeviceToDevice, ranks.streams[0]));
  });
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  std::printf(
      "%d ranks, %4lld x %5lld: chain %7.2f us, inside %7.2f us, copy of its bytes %7.2f us, %.2f of it\n",
      size, static_cast<long long>(rows), static_cast<long long>(hidden), mine, inside / kRepeats, copy,
      inside / kRepeats / copy);
}

}  // namespace

int main(int argc, char** argv) {
  // Streams that share a queue would wait for each other for ever.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
  int wrong = 0;
  for (const int size : {1, 2, 3, 4, 8}) {
    for (const std::int64_t rows : {1, 5, 128}) {
      for (const std::int64_t hidden : {72, 2048, 7168, 16384}) {
        if (!quick || hidden == 7168) wrong += check(size, rows, hidden);
      }
    }
  }
  if (wrong > 0) return 1;
  for (const int size : {1, 2, 4, 8}) {
    for (const std::int64_t rows : {1, 32, 128, 1024}) time_shape(size, rows, 7168);
  }
  return 0;
}
