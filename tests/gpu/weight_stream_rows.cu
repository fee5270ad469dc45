// Times the weight-streaming products over the shapes of V2-Lite and V3.
//
//   weight_stream_rows [--e4m3 | --int4 | --w4a8] [--sweep] [--dense] [--experts] [--m 1,8,32]
//
// "cold": one launch behind a read pass over 256 MiB and a spin kernel, events around it; median. "chain": a
// CUDA graph of products back to back over different weights (more than the L2 holds), launched early; time
// of one. GB/s counts the weights once, x and out. --sweep tries every division of the work instead of the
// planned one; --e4m3 and --int4 have weights in these with scales; --w4a8: int4 with activations in e4m3, experts alone. Correctness is model_kernels_gpu's affair.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels/gemm/sm90/narrow_gemm.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/gemm/sm90/weight_stream.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/quant/sm90/quantise_rows.h"
#include "protocol.cuh"

namespace {

using namespace flash_mla::sm90;

#define CHECK(x)                                                                              \
  do {                                                                                        \
    const cudaError_t e = (x);                                                                \
    if (e != cudaSuccess) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e)); \
      std::exit(2);                                                                           \
    }                                                                                         \
  } while (0)

constexpr double kStreamRate = 4650;  // GB/s, the read-only stream of an H200
constexpr std::size_t kFlushBytes = 256u << 20;

__device__ std::uint32_t mix(std::uint64_t x) {
  x ^= x >> 33;
  x *= 0xff51afd7ed558ccdull;
  x ^= x >> 33;
  x *= 0xc4ceb9fe1a85ec53ull;
  return static_cast<std::uint32_t>(x >> 32);
}

__global__ void fill(__nv_bfloat16* p, std::size_t n, float scale) {
  for (std::size_t i = blockIdx.x * std::size_t(blockDim.x) + threadIdx.x; i < n;
       i += std::size_t(gridDim.x) * blockDim.x) {
    p[i] = __float2bfloat16((static_cast<float>(mix(i)) * 4.656613e-10f - 1.0f) * scale);
  }
}

__nv_bfloat16* random_array(std::size_t n, float scale) {
  void* p = nullptr;
  CHECK(cudaMalloc(&p, n * 2 + 256));
  fill<<<1056, 256>>>(static_cast<__nv_bfloat16*>(p), n, scale);
  CHECK(cudaGetLastError());
  return static_cast<__nv_bfloat16*>(p);
}

template <class T>
T* scratch(std::size_t n) {
  void* p = nullptr;
  CHECK(cudaMalloc(&p, n * sizeof(T) + 256));
  return static_cast<T*>(p);
}

/// What weights are stored as.
struct Form {
  const float* scales = nullptr;  ///< null: bfloat16
  bool int4 = false;
  double bytes = 2;  ///< of a weight, with its share of a scale
  bool w4a8 = false;
};

/// With scales of e4m3 or int4 weights, of as many as any shape here has.
Form scaled(bool int4) {
  constexpr std::size_t kWeights = std::size_t(2) * 256 * 7168 * 2048;
  const std::size_t count = kWeights / (int4 ? 128 : 1024);
  float* const scales = scratch<float>(count);
  CHECK(cudaMemset(scales, 0x3c, count * sizeof(float)));  // 0.0115
  return {scales, int4, int4 ? 0.5 + 4.0 / 128 : 1 + 4.0 / 1024, false};
}

class Timer {
 public:
  Timer() : flush_(random_array(kFlushBytes / 2, 1)), sink_(scratch<std::uint32_t>(1)) {
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
    CHECK(cudaDeviceSynchronize());
  }
  /// Microseconds of one launch from a cold L2.
  double cold(const std::function<void(cudaStream_t)>& launch, int repeats) {
    std::vector<float> times;
    for (int i = 0; i < repeats; ++i) {
      read_pass<<<1056, 256, 0, stream_>>>(reinterpret_cast<const uint4*>(flush_), kFlushBytes / 16, sink_);
      spin<<<1, 1, 0, stream_>>>(40000);
      CHECK(cudaEventRecord(begin_, stream_));
      launch(stream_);
      CHECK(cudaEventRecord(end_, stream_));
      CHECK(cudaEventSynchronize(end_));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin_, end_));
      times.push_back(ms * 1000);
    }
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
  }
  /// Microseconds of a graph of what `queue` queues.
  double graph(const std::function<void(cudaStream_t)>& queue, int repeats) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    queue(stream_);
    CHECK(cudaStreamEndCapture(stream_, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    CHECK(cudaGraphLaunch(exec, stream_));
    const double time = cold([&](cudaStream_t s) { CHECK(cudaGraphLaunch(exec, s)); }, repeats);
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    return time;
  }

 private:
  __nv_bfloat16* flush_;
  std::uint32_t* sink_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

struct Shape {
  const char* name;
  std::int64_t n, k;
  bool silu;
};

const Shape kShapes[] = {
    {"tiny", 64, 64, false},  // what a link of the chain costs without weights
    {"V2L q", 3072, 2048, false},
    {"V2L kv_a", 576, 2048, false},
    {"V2L o", 2048, 2048, false},
    {"V2L shared gate_up", 5632, 2048, true},
    {"V2L shared down", 2048, 2816, false},
    {"V2L dense gate_up", 21888, 2048, true},
    {"V2L head", 102400, 2048, false},
    {"V3 q_a", 1536, 7168, false},
    {"V3 kv_a", 576, 7168, false},
    {"V3 q_b", 24576, 1536, false},
    {"V3 o", 7168, 16384, false},
    {"V3 shared gate_up", 4096, 7168, true},
    {"V3 shared down", 7168, 2048, false},
};

std::string text(const StreamPlan& plan) {
  char out[64];
  std::snprintf(out, sizeof out, "g%dt%dn%dc%dw%dx%d", plan.groups, plan.tiles, plan.warps_n, plan.cluster,
                plan.width, plan.ctas_per_sm);
  return out;
}

/// One of the experts' products on its own, under every plan.
void sweep_experts(Timer& timer, const char* name, WeightStream a, const std::vector<std::int32_t>& ids,
                   int experts, int tokens, int num_sms) {
  const std::size_t pairs = ids.size();
  std::vector<std::int32_t> order(pairs), count(static_cast<std::size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
    return ids[static_cast<std::size_t>(i)] < ids[static_cast<std::size_t>(j)];
  });
  for (const std::int32_t e : ids) ++count[static_cast<std::size_t>(e)];
  for (const int rows : {8, 16, 32, 64}) {
    std::vector<ExpertUnit> units;
    std::int32_t first = 0;
    for (int e = 0; e < experts; ++e) {
      const std::int32_t c = count[static_cast<std::size_t>(e)];
      for (std::int32_t u = 0; u < c; u += rows) units.push_back({e, first + u, std::min(rows, c - u)});
      first += c;
    }
    auto* device_units = scratch<ExpertUnit>(units.size());
    auto* device_pairs = scratch<std::int32_t>(pairs);
    auto* num_units = scratch<std::int32_t>(1);
    const auto n = static_cast<std::int32_t>(units.size());
    CHECK(cudaMemcpy(device_units, units.data(), units.size() * sizeof(ExpertUnit), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(device_pairs, order.data(), pairs * 4, cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(num_units, &n, 4, cudaMemcpyHostToDevice));
    a.units = device_units;
    a.pairs = device_pairs;
    a.num_units = num_units;
    a.max_units = a.likely_units = n;
    a.rows_per_unit = rows;
    a.m = static_cast<std::int64_t>(pairs);
    double best = 1e30;
    StreamPlan best_plan{};
    for (const StreamPlan& plan : stream_plans(a, num_sms)) {
      const double time = timer.cold([&](cudaStream_t s) { CHECK(launch_stream(a, plan, s)); }, 3);
      std::fprintf(stderr, "%s|%d|%s|%.2f\n", name, tokens, text(plan).c_str(), time);
      if (time < best) {
        best = time;
        best_plan = plan;
      }
    }
    std::printf("%s tokens %d rows %d units %d best %s %.1f us\n", name, tokens, rows, n,
                text(best_plan).c_str(), best);
    CHECK(cudaFree(device_units));
    CHECK(cudaFree(device_pairs));
    CHECK(cudaFree(num_units));
  }
}

void dense(Timer& timer, const std::vector<int>& rows, bool sweep, int num_sms, const Form& form) {
  constexpr std::size_t kPool = std::size_t(640) << 20;
  __nv_bfloat16* weights = random_array(kPool / 2, 0.03f);
  const auto most = static_cast<std::size_t>(*std::max_element(rows.begin(), rows.end()));
  __nv_bfloat16* x = random_array(most * 16384, 1.0f);
  __nv_bfloat16* out = random_array(most * 102400, 1.0f);
  std::printf("%-20s %4s %10s  %8s %8s %5s  %8s %8s %5s\n", "dense", "m", "plan", "cold us", "GB/s", "%",
              "chain us", "GB/s", "%");
  for (const Shape& shape : kShapes) {
    const std::size_t elements = std::size_t(shape.n * shape.k);
    const std::size_t size = form.int4 ? elements / 2 : form.scales != nullptr ? elements : 2 * elements;
    const int copies = static_cast<int>(std::clamp<std::size_t>(kPool / size, 1, 40));
    for (const int m : rows) {
      WeightStream a;
      a.x = x;
      a.weight = weights;
      a.scales = form.scales;
      a.weight_int4 = form.int4;
      a.out = out;
      a.x_stride = a.k = shape.k;
      a.n = shape.n;
      a.out_stride = shape.silu ? shape.n / 2 : shape.n;
      a.m = m;
      a.silu_mul = shape.silu;
      a.programmatic_launch = true;
      std::vector<StreamPlan> plans = {plan_stream(a, num_sms)};
      if (sweep) {
        for (const StreamPlan& plan : stream_plans(a, num_sms)) plans.push_back(plan);
      }
      const double bytes = form.bytes * static_cast<double>(elements) +
                           2.0 * static_cast<double>(m * (shape.k + a.out_stride));
      double best = 1e30;
      StreamPlan best_plan{};
      for (std::size_t i = 0; i < plans.size(); ++i) {
        const StreamPlan& plan = plans[i];
        const double chain = timer.graph(
                                 [&](cudaStream_t s) {
                                   for (int c = 0; c < copies; ++c) {
                                     WeightStream b = a;
                                     b.weight =
                                         reinterpret_cast<const std::byte*>(weights) + std::size_t(c) * size;
                                     CHECK(launch_stream(b, plan, s));
                                   }
                                 },
                                 sweep ? 3 : 7) /
                             copies;
        if (chain < best) {
          best = chain;
          best_plan = plan;
        }
        if (sweep) std::fprintf(stderr, "%s|%d|%s|%.2f\n", shape.name, m, text(plan).c_str(), chain);
        if (i > 0) continue;
        WeightStream alone = a;
        alone.programmatic_launch = false;
        const double cold =
            timer.cold([&](cudaStream_t s) { CHECK(launch_stream(alone, plan, s)); }, sweep ? 5 : 15);
        std::printf("%-20s %4d %15s  %8.2f %8.0f %5.1f  %8.2f %8.0f %5.1f", shape.name, m, text(plan).c_str(),
                    cold, bytes / cold / 1000, bytes / cold / 10 / kStreamRate, chain, bytes / chain / 1000,
                    bytes / chain / 10 / kStreamRate);
      }
      if (sweep) {
        std::printf("  | %s %.2f %.1f", text(best_plan).c_str(), best, bytes / best / 10 / kStreamRate);
      }
      std::printf("\n");
    }
  }
  CHECK(cudaFree(weights));
  CHECK(cudaFree(x));
  CHECK(cudaFree(out));
}

void experts(Timer& timer, const std::vector<int>& rows, bool sweep, int num_sms, const Form& form) {
  struct Layer {
    const char* name;
    int hidden, intermediate, experts, chosen, groups, kept;
  };
  std::printf("%-8s %6s %6s  %9s %8s %5s %8s  %9s %8s  %8s\n", "experts", "tokens", "hit", "cold us", "GB/s",
              "%", "TFLOP/s", "graph us", "GB/s", "route us");
  for (const Layer& l : {Layer{"V2-Lite", 2048, 1408, 64, 6, 1, 1}, Layer{"V3", 7168, 2048, 256, 8, 8, 4}}) {
    const std::size_t each = std::size_t(l.hidden) * std::size_t(l.intermediate);
    __nv_bfloat16* gate_up = random_array(2 * each * std::size_t(l.experts), 0.03f);
    __nv_bfloat16* down = random_array(each * std::size_t(l.experts), 0.03f);
    float* router =
        reinterpret_cast<float*>(random_array(std::size_t(l.experts) * std::size_t(l.hidden) * 2, 0.03f));
    for (const int tokens : rows) {
      const std::size_t pairs = std::size_t(tokens) * std::size_t(l.chosen);
      __nv_bfloat16* x = random_array(std::size_t(tokens) * std::size_t(l.hidden), 1.0f);
      __nv_bfloat16* inout = random_array(std::size_t(tokens) * std::size_t(l.hidden), 1.0f);
      auto* ids = scratch<std::int32_t>(pairs);
      auto* weights = scratch<float>(pairs);
      auto* logits = scratch<float>(std::size_t(tokens) * std::size_t(l.experts));
      auto* workspace = scratch<std::byte>(
          expert_ffn_workspace_size(tokens, l.hidden, l.intermediate, l.experts, l.chosen));
      std::mt19937 random(5);
      std::vector<std::int32_t> host, all(static_cast<std::size_t>(l.experts));
      for (int t = 0; t < tokens; ++t) {
        std::iota(all.begin(), all.end(), 0);
        std::shuffle(all.begin(), all.end(), random);
        host.insert(host.end(), all.begin(), all.begin() + l.chosen);
      }
      CHECK(cudaMemcpy(ids, host.data(), pairs * 4, cudaMemcpyHostToDevice));
      CHECK(cudaMemset(weights, 0x3c, pairs * 4));
      ExpertFfn f;
      f.x = x;
      f.x_stride = f.inout_stride = f.hidden = l.hidden;
      f.gate_up = gate_up;
      f.down = down;
      f.gate_up_scales = f.down_scales = form.scales;
      f.int4 = form.int4;
      if (form.w4a8) f.fp8_rows = 0;
      f.ids = ids;
      f.weights = weights;
      f.inout = inout;
      f.tokens = tokens;
      f.intermediate = l.intermediate;
      f.num_experts = l.experts;
      f.experts_per_token = l.chosen;
      f.workspace = workspace;
      f.programmatic_launch = true;
      RouteArgs r;
      r.x = x;
      r.x_stride = r.hidden = l.hidden;
      r.router = router;
      r.logits = logits;
      r.ids = scratch<std::int32_t>(pairs);
      r.weights = weights;
      r.tokens = tokens;
      r.routing = {l.experts, l.chosen, 0, l.groups, l.kept};
      if (l.groups > 1) {
        r.routing.scoring = flash_mla::ScoringFunc::kSigmoid;
        r.routing.method = flash_mla::TopkMethod::kNoAuxTc;
      }
      r.programmatic_launch = true;
      if (sweep && tokens <= 128) {
        auto* act = random_array(pairs * static_cast<std::size_t>(l.intermediate), 1.0f);
        auto* results = scratch<float>(pairs * static_cast<std::size_t>(l.hidden));
        WeightStream a;
        a.weight = gate_up;
        a.scales = form.scales;
        a.weight_int4 = form.int4;
        a.x = x;
        a.x_stride = a.k = l.hidden;
        a.x_divisor = l.chosen;
        a.n = 2 * l.intermediate;
        a.out = act;
        a.out_stride = l.intermediate;
        a.silu_mul = true;
        sweep_experts(timer, (std::string(l.name) + " gate_up").c_str(), a, host, l.experts, tokens, num_sms);
        a = {};
        a.weight = down;
        a.scales = form.scales;
        a.weight_int4 = form.int4;
        a.x = act;
        a.x_stride = a.k = l.intermediate;
        a.n = l.hidden;
        a.out = results;
        a.out_stride = l.hidden;
        a.out_fp32 = true;
        sweep_experts(timer, (std::string(l.name) + " down").c_str(), a, host, l.experts, tokens, num_sms);
        CHECK(cudaFree(act));
        CHECK(cudaFree(results));
      }
      const double hit = static_cast<double>(std::set<std::int32_t>(host.begin(), host.end()).size());
      const double bytes = hit * 3 * form.bytes * static_cast<double>(each) + 6.0 * tokens * l.hidden;
      const double flop = 6.0 * static_cast<double>(each) * static_cast<double>(pairs);
      const double cold = timer.cold([&](cudaStream_t s) { CHECK(expert_ffn(f, s)); }, 7);
      const double graph = timer.graph([&](cudaStream_t s) { CHECK(expert_ffn(f, s)); }, 7);
      const double route_time = timer.graph([&](cudaStream_t s) { CHECK(route(r, s)); }, 7);
      std::printf("%-8s %6d %6.0f  %9.1f %8.0f %5.1f %8.0f  %9.1f %8.0f  %8.2f\n", l.name, tokens, hit, cold,
                  bytes / cold / 1000, bytes / cold / 10 / kStreamRate, flop / cold / 1e6, graph,
                  bytes / graph / 1000, route_time);
      for (void* p : {static_cast<void*>(x), static_cast<void*>(inout), static_cast<void*>(ids),
                      static_cast<void*>(weights), static_cast<void*>(logits), static_cast<void*>(workspace),
                      static_cast<void*>(r.ids)}) {
        CHECK(cudaFree(p));
      }
    }
    CHECK(cudaFree(gate_up));
    CHECK(cudaFree(down));
    CHECK(cudaFree(router));
  }
}

/// Eight experts with the same number of rows each, n = 4096, k = 7168.
void masked(Timer& timer, const Form& form) {
  constexpr int kExperts = 8, kN = 4096, kK = 7168, kBlocks = kK / 128;
  __nv_bfloat16* const weight = random_array(std::size_t{kExperts} * kN * kK / 4, 0.03f);
  for (const int each : {4, 16, 32, 64, 128, 1024, 4096}) {
    const int m = kExperts * each;
    __nv_bfloat16* const values = random_array(std::size_t(m) * kK, 1.0f);
    QuantiseRows q;
    q.x = values;
    q.x_stride = q.columns = kK;
    q.rows = m;
    q.codes = scratch<std::uint8_t>(std::size_t(m) * kK);
    q.scales = scratch<float>(std::size_t(m) * kBlocks);
    q.offsets = scratch<float>(std::size_t(m) * kBlocks);
    CHECK(quantise_rows(q, nullptr));
    CHECK(cudaDeviceSynchronize());
    for (const int tile : {16, 32, 64, 128}) {
      if (tile > 2 * each && tile > 16) continue;
      std::vector<ExpertUnit> host;
      for (int e = 0; e < kExperts; ++e) {
        for (int r = 0; r < each; r += tile) host.push_back({e, e * each + r, std::min(tile, each - r)});
      }
      const auto count = static_cast<std::int32_t>(host.size());
      auto* const units = scratch<ExpertUnit>(host.size());
      auto* const num_units = scratch<std::int32_t>(1);
      CHECK(cudaMemcpy(units, host.data(), host.size() * sizeof(ExpertUnit), cudaMemcpyHostToDevice));
      CHECK(cudaMemcpy(num_units, &count, 4, cudaMemcpyHostToDevice));
      NarrowGemm g;
      g.x = q.codes;
      g.x_scales = q.scales;
      g.x_offsets = q.offsets;
      g.weight = weight;
      g.weight_scales = form.scales;
      g.m = g.x_rows = m;
      g.n = g.out_stride = kN;
      g.k = kK;
      g.experts = kExperts;
      g.units = units;
      g.num_units = num_units;
      g.max_units = count;
      g.rows_per_unit = tile;
      g.out = scratch<__nv_bfloat16>(std::size_t(m) * kN);
      const double us = timer.cold([&](cudaStream_t s) { CHECK(narrow_gemm(g, s)); }, 15);
      const double bytes = kExperts * form.bytes * kN * kK;
      std::printf("narrow_gemm 8 x %4d rows, tiles of %3d: %8.1f us, weights at %5.0f GB/s, %5.0f TFLOP/s\n",
                  each, tile, us, bytes / us / 1000, 2.0 * m * kN * kK / us / 1e6);
      for (void* p : {static_cast<void*>(units), static_cast<void*>(num_units), g.out}) CHECK(cudaFree(p));
    }
    for (void* p :
         {static_cast<void*>(values), q.codes, static_cast<void*>(q.scales), static_cast<void*>(q.offsets)})
      CHECK(cudaFree(p));
  }
  CHECK(cudaFree(weight));
}

}  // namespace

int main(int argc, char** argv) {
  bool e4m3 = false, int4 = false, w4a8 = false, sweep = false, only_dense = false, only_experts = false;
  std::vector<int> rows = {1, 8, 32, 64};
  std::vector<int> tokens = {1, 8, 32, 64, 128, 512, 4096};
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--e4m3") == 0) {
      e4m3 = true;
    } else if (std::strcmp(argv[i], "--int4") == 0) {
      int4 = true;
    } else if (std::strcmp(argv[i], "--w4a8") == 0) {
      int4 = w4a8 = only_experts = true;
    } else if (std::strcmp(argv[i], "--sweep") == 0) {
      sweep = true;
    } else if (std::strcmp(argv[i], "--dense") == 0) {
      only_dense = true;
    } else if (std::strcmp(argv[i], "--experts") == 0) {
      only_experts = true;
    } else if (std::strcmp(argv[i], "--m") == 0 && i + 1 < argc) {
      rows.clear();
      for (char* p = std::strtok(argv[++i], ","); p != nullptr; p = std::strtok(nullptr, ",")) {
        rows.push_back(std::atoi(p));
      }
      tokens = rows;
    } else {
      std::fprintf(stderr, "weight_stream_rows: unknown option %s\n", argv[i]);
      return 2;
    }
  }
  cudaDeviceProp device{};
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %d multiprocessors; %% of %.0f GB/s\n", device.name, device.multiProcessorCount,
              kStreamRate);
  Timer timer;
  Form form = e4m3 || int4 ? scaled(int4) : Form{};
  form.w4a8 = w4a8;
  if (w4a8) masked(timer, form);
  if (!only_experts) dense(timer, rows, sweep, device.multiProcessorCount, form);
  if (!only_dense) experts(timer, tokens, sweep, device.multiProcessorCount, form);
}
