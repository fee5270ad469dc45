// Times products in FP8 over the shapes of V2-Lite and V3, beside the same in bfloat16.
//
//   fp8_gemm_rows [--dense] [--grouped] [--experts] [--sweep]
//
// Microseconds of one launch behind a read pass over 256 MiB and a spin kernel, events around it, median; TFLOP/s counts
// the products of rows that there are. "bf16": cuBLASLt's product (dense; 0 where the library is missing), or the experts'
// tiles in bfloat16. --sweep tries every way to cut the product instead of the planned one. Correctness is
// model_kernels_gpu's affair.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/gemm/sm90/cublaslt.h"
#include "kernels/gemm/sm90/fp8_gemm.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/gemm/sm90/widen_weights.h"
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

constexpr std::size_t kFlushBytes = 256u << 20;
constexpr float kScale = 0.01f;

/// Memory of the device, filled.
class Array {
 public:
  explicit Array(std::size_t bytes) { CHECK(cudaMalloc(&data_, bytes + 256)); }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  static std::unique_ptr<Array> codes(std::int64_t n, std::uint64_t seed) {
    auto a = std::make_unique<Array>(static_cast<std::size_t>(n));
    CHECK(fill_random_e4m3(a->data_, n, seed, nullptr));
    return a;
  }
  static std::unique_ptr<Array> floats(std::int64_t n, float value) {
    auto a = std::make_unique<Array>(static_cast<std::size_t>(n) * sizeof(float));
    const std::vector<float> host(static_cast<std::size_t>(n), value);
    CHECK(cudaMemcpy(a->data_, host.data(), host.size() * sizeof(float), cudaMemcpyHostToDevice));
    return a;
  }
  /// Codes times kScale.
  static std::unique_ptr<Array> bf16(std::int64_t n, std::uint64_t seed) {
    constexpr std::int64_t kPart = std::int64_t{1} << 26;
    auto a = std::make_unique<Array>(static_cast<std::size_t>(n) * 2);
    const auto part = codes(std::min(n, kPart), seed);
    const auto scales = floats((std::min(n, kPart) + 127) / 128, kScale);
    for (std::int64_t at = 0; at < n; at += kPart) {
      WidenWeights w;
      w.codes = part->data_;
      w.scales = scales->as<float>();
      w.out = a->as<__nv_bfloat16>() + at;
      w.rows = 1;
      w.columns = std::min(kPart, n - at);
      CHECK(widen_weights(w, nullptr));
    }
    CHECK(cudaDeviceSynchronize());
    return a;
  }

 private:
  void* data_ = nullptr;
};

class Timer {
 public:
  Timer() : flush_(kFlushBytes), sink_(4) {
    CHECK(cudaMemset(flush_.as<void>(), 1, kFlushBytes));
    CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin_));
    CHECK(cudaEventCreate(&end_));
    CHECK(cudaDeviceSynchronize());
  }
  double microseconds(const std::function<void(cudaStream_t)>& launch, int repeats = 9) {
    std::vector<float> times;
    for (int i = 0; i < repeats + 2; ++i) {
      read_pass<<<1056, 256, 0, stream_>>>(flush_.as<uint4>(), kFlushBytes / 16, sink_.as<std::uint32_t>());
      spin<<<1, 1, 0, stream_>>>(60000);
      CHECK(cudaEventRecord(begin_, stream_));
      launch(stream_);
      CHECK(cudaEventRecord(end_, stream_));
      CHECK(cudaEventSynchronize(end_));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, begin_, end_));
      if (i >= 2) times.push_back(ms * 1000);
    }
    std::sort(times.begin(), times.end());
    return static_cast<double>(times[times.size() / 2]);
  }

 private:
  Array flush_, sink_;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

struct Cut {
  Fp8Tiles tiles;
  bool blocks;
};

std::string text(const Cut& cut) {
  char out[48];
  std::snprintf(out, sizeof out, "%d g%d%s %s", cut.tiles.columns, cut.tiles.group,
                cut.tiles.turns ? "t" : "", cut.blocks ? "128" : "8");
  return out;
}

std::vector<Cut> cuts(const Fp8Tiles& planned, bool silu, bool sweep) {
  Fp8Tiles turns = planned;
  turns.turns = true;
  std::vector<Cut> out = {{planned, true}, {planned, false}, {turns, true}};
  if (!sweep) return out;
  for (const bool in_turns : {false, true}) {
    for (const int group : {4, 8, 32}) out.push_back({{256, group, in_turns}, true});
  }
  if (!silu) out.push_back({{128, 16}, true});
  return out;
}

/// Times `g` under every cut.
void time_cuts(Timer& timer, Fp8Gemm g, double flop, bool sweep,
               const std::function<void(Fp8Gemm&)>& prepare = {}) {
  for (const Cut& cut : cuts(g.tiles, g.silu_quantise, sweep)) {
    g.tiles = cut.tiles;
    g.whole_blocks = cut.blocks;
    if (prepare) prepare(g);
    const double us = timer.microseconds([&](cudaStream_t s) { CHECK(fp8_gemm(g, s)); });
    std::printf("  %s: %.1f us %.0f", text(cut).c_str(), us, flop / us / 1e6);
  }
  std::printf("\n");
}

void dense(Timer& timer, bool sweep, int num_sms) {
  struct Shape {
    const char* name;
    std::int64_t n, k;
  };
  const Shape shapes[] = {{"V3 qkv_a", 2112, 7168},
                          {"V3 q_b", 24576, 1536},
                          {"V3 kv_b", 32768, 512},
                          {"V3 o", 7168, 16384},
                          {"V3 dense gate_up", 36864, 7168},
                          {"V3 dense down", 7168, 18432},
                          {"V3 shared gate_up", 4096, 7168},
                          {"V3 shared down", 7168, 2048},
                          {"V2L q", 3072, 2048},
                          {"V2L o", 2048, 2048}};
  std::unique_ptr<CublasLt> lt;
  if (const std::string why = why_no_cublaslt(); why.empty()) {
    lt = std::make_unique<CublasLt>();
  } else {
    std::printf("no cuBLASLt: %s\n", why.c_str());
  }
  const std::int64_t most = 8192, widest = 36864, deepest = 18432;
  const auto x = Array::codes(most * deepest, 1), weight = Array::codes(widest * 7168, 2);
  const auto x_bf16 = Array::bf16(most * deepest, 1), weight_bf16 = Array::bf16(widest * 7168, 2);
  const auto scales = Array::floats(std::max(most * deepest / 128, widest * 7168 / 1024) + 4096, kScale);
  const Array out(static_cast<std::size_t>(most * widest) * 2);
  std::printf("dense: columns, group (t: in turns), rows of a scale: us, TFLOP/s\n");
  for (const Shape& shape : shapes) {
    for (const std::int64_t m : {16, 32, 64, 128, 256, 1024, 4096, 8192}) {
      Fp8Gemm g;
      g.x = x->as<void>();
      g.x_stride = g.k = shape.k;
      g.x_scales = g.weight_scales = scales->as<float>();
      g.weight = weight->as<void>();
      g.m = g.x_rows = m;
      g.n = g.out_stride = shape.n;
      g.out = out.as<void>();
      g.tiles = plan_fp8_gemm(m, shape.n, 1, false, num_sms);
      const double flop =
          2.0 * static_cast<double>(m) * static_cast<double>(shape.n) * static_cast<double>(shape.k);
      double bf16 = 0;
      if (lt) {
        const flash_mla::DType type = flash_mla::DType::kBFloat16;
        bf16 = timer.microseconds([&](cudaStream_t s) {
          lt->gemm({x_bf16->as<std::byte>(), type, m, shape.k, shape.k}, weight_bf16->as<std::byte>(),
                   {out.as<std::byte>(), type, m, shape.n, shape.n}, false, s);
        });
      }
      QuantiseRows q;
      q.x = x_bf16->as<void>();
      q.x_stride = q.columns = shape.k;
      q.codes = out.as<void>();
      q.scales = reinterpret_cast<float*>(out.as<std::byte>() + m * shape.k);
      q.rows = m;
      const double quantise = timer.microseconds([&](cudaStream_t s) { CHECK(quantise_rows(q, s)); });
      std::printf("%-18s m %5d: bf16 %.1f us %.0f, quantise %.1f", shape.name, static_cast<int>(m), bf16,
                  bf16 > 0 ? flop / bf16 / 1e6 : 0, quantise);
      if (m <= 64) {  // what a step of few rows takes today
        SkinnyGemm few;
        few.x = x_bf16->as<void>();
        few.x_stride = few.k = shape.k;
        few.weight = weight->as<void>();
        few.weight_scales = scales->as<float>();
        few.out = out.as<void>();
        few.n = few.out_stride = shape.n;
        few.m = m;
        std::printf(", few rows %.1f",
                    timer.microseconds([&](cudaStream_t s) { CHECK(skinny_gemm(few, s)); }));
      }
      time_cuts(timer, g, flop, sweep && m >= 4096);
    }
  }
}

/// Products of `groups` matrices with `rows` rows each on average.
void grouped(Timer& timer, const char* name, int groups, int rows, bool uneven, std::int64_t n,
             std::int64_t k, bool silu, bool sweep, int num_sms) {
  std::mt19937 random(3);
  std::vector<int> counts(static_cast<std::size_t>(groups), rows);
  if (uneven) {  // as a router spreads tokens
    std::fill(counts.begin(), counts.end(), 0);
    for (int i = 0; i < groups * rows; ++i) ++counts[random() % counts.size()];
  }
  const std::int64_t m = std::int64_t{groups} * rows;
  const auto x = Array::codes(m * k, 1), weight = Array::codes(groups * n * k, 2);
  const auto scales = Array::floats(std::max(m * k / 128, groups * n * k / 1024) + 4096, kScale);
  const auto out_scales = Array::floats(m * ((n + 127) / 128), 0.0f);
  const Array out(static_cast<std::size_t>(m * n) * 4);
  std::vector<std::int32_t> order(static_cast<std::size_t>(m));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  const Array pairs(order.size() * 4), units(static_cast<std::size_t>(m / 128 + groups) * sizeof(ExpertUnit)),
      num_units(4);
  CHECK(cudaMemcpy(pairs.as<void>(), order.data(), order.size() * 4, cudaMemcpyHostToDevice));
  Fp8Gemm g;
  g.x = x->as<void>();
  g.x_stride = g.k = k;
  g.x_scales = g.weight_scales = scales->as<float>();
  g.weight = weight->as<void>();
  g.m = g.x_rows = m;
  g.n = n;
  g.experts = groups;
  g.out = out.as<void>();
  g.out_stride = n;
  g.gather = g.silu_quantise = silu;
  g.out_scales = out_scales->as<float>();
  g.pairs = pairs.as<std::int32_t>();
  g.units = units.as<ExpertUnit>();
  g.num_units = num_units.as<std::int32_t>();
  g.tiles = plan_fp8_gemm(rows, n, groups, silu, num_sms);
  const double flop = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  const auto prepare = [&](Fp8Gemm& a) {
    constexpr int kMost = 128;
    std::vector<ExpertUnit> list;
    for (int e = 0, first = 0; e < groups; ++e) {
      const int count = counts[static_cast<std::size_t>(e)];
      for (int u = 0; u < count; u += kMost) list.push_back({e, first + u, std::min(kMost, count - u)});
      first += count;
    }
    const auto size = static_cast<std::int32_t>(list.size());
    CHECK(
        cudaMemcpy(units.as<void>(), list.data(), list.size() * sizeof(ExpertUnit), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(num_units.as<void>(), &size, 4, cudaMemcpyHostToDevice));
    a.max_units = size;
  };
  std::printf("%-22s %3d x %4d%s, n %d k %d:", name, groups, rows, uneven ? " uneven" : "",
              static_cast<int>(n), static_cast<int>(k));
  time_cuts(timer, g, flop, sweep, prepare);
  if (silu) return;
  g.tiles = plan_fp8_gemm(rows, n, groups, silu, num_sms);
  prepare(g);
  g.scatter = g.out_fp32 = g.whole_blocks = true;
  const double us = timer.microseconds([&](cudaStream_t s) { CHECK(fp8_gemm(g, s)); });
  std::printf("%-22s scattered, fp32: %.1f us %.0f\n", "", us, flop / us / 1e6);
}

void experts(Timer& timer) {
  struct Layer {
    const char* name;
    int hidden, intermediate, experts, chosen;
  };
  std::printf("experts of a layer, us: bf16 weights; e4m3 weights; both in FP8 (scales of 8 rows; of 128)\n");
  for (const Layer& l : {Layer{"V2-Lite", 2048, 1408, 64, 6}, Layer{"V3", 7168, 2048, 256, 8}}) {
    const std::int64_t each = std::int64_t{l.hidden} * l.intermediate, all = each * l.experts;
    const auto gate_up = Array::bf16(2 * all, 1), down = Array::bf16(all, 2);
    const auto gate_up_codes = Array::codes(2 * all, 1), down_codes = Array::codes(all, 2);
    const auto scales = Array::floats(2 * all / 1024 + 4096, kScale);
    for (const int tokens : {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384}) {
      const std::int64_t pairs = std::int64_t{tokens} * l.chosen;
      const auto x = Array::bf16(std::int64_t{tokens} * l.hidden, 3),
                 inout = Array::bf16(std::int64_t{tokens} * l.hidden, 4);
      const auto weights = Array::floats(pairs, 0.1f);
      const Array ids(static_cast<std::size_t>(pairs) * 4),
          workspace(expert_ffn_workspace_size(tokens, l.hidden, l.intermediate, l.experts, l.chosen));
      std::mt19937 random(5);
      std::vector<std::int32_t> host, every(static_cast<std::size_t>(l.experts));
      std::iota(every.begin(), every.end(), 0);
      for (int t = 0; t < tokens; ++t) {
        for (int i = 0; i < l.chosen; ++i) {
          std::swap(every[static_cast<std::size_t>(i)],
                    every[static_cast<std::size_t>(i) + random() % static_cast<unsigned>(l.experts - i)]);
        }
        host.insert(host.end(), every.begin(), every.begin() + l.chosen);
      }
      CHECK(cudaMemcpy(ids.as<void>(), host.data(), host.size() * 4, cudaMemcpyHostToDevice));
      ExpertFfn f;
      f.x = x->as<void>();
      f.x_stride = f.inout_stride = f.hidden = l.hidden;
      f.gate_up = gate_up->as<void>();
      f.down = down->as<void>();
      f.ids = ids.as<std::int32_t>();
      f.weights = weights->as<float>();
      f.inout = inout->as<void>();
      f.tokens = tokens;
      f.intermediate = l.intermediate;
      f.num_experts = l.experts;
      f.experts_per_token = l.chosen;
      f.workspace = workspace.as<void>();
      f.programmatic_launch = true;
      const auto time = [&] {
        return timer.microseconds([&](cudaStream_t s) { CHECK(expert_ffn(f, s)); }, 5);
      };
      const double flop = 6.0 * static_cast<double>(each) * static_cast<double>(pairs);
      const double bf16 = time();
      f.gate_up = gate_up_codes->as<void>();
      f.down = down_codes->as<void>();
      f.gate_up_scales = f.down_scales = scales->as<float>();
      const double e4m3 = time();
      f.fp8_rows = 0;
      const double of_8 = time();
      f.whole_blocks = true;
      const double of_128 = time();
      std::printf("%-8s %5d tokens: %8.1f %8.1f %8.1f %8.1f; TFLOP/s %4.0f %4.0f %4.0f %4.0f\n", l.name,
                  tokens, bf16, e4m3, of_8, of_128, flop / bf16 / 1e6, flop / e4m3 / 1e6, flop / of_8 / 1e6,
                  flop / of_128 / 1e6);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool all = true, only_dense = false, only_grouped = false, only_experts = false, sweep = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--sweep") {
      sweep = true;
    } else if (option == "--dense") {
      only_dense = true;
    } else if (option == "--grouped") {
      only_grouped = true;
    } else if (option == "--experts") {
      only_experts = true;
    } else {
      std::fprintf(stderr, "fp8_gemm_rows: unknown option %s\n", argv[i]);
      return 2;
    }
  }
  all = !only_dense && !only_grouped && !only_experts;
  cudaDeviceProp device{};
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int sms = device.multiProcessorCount;
  std::printf("%s, %d multiprocessors\n", device.name, sms);
  Timer timer;
  if (all || only_grouped) {
    std::printf("grouped: columns, group (t: in turns), rows of a scale: us, TFLOP/s\n");
    for (const int rows : {16, 64, 128, 256}) {
      grouped(timer, "few rows", 8, rows, false, 4096, 7168, false, false, sms);
    }
    grouped(timer, "many rows", 8, 4096, false, 4096, 7168, false, sweep, sms);
    grouped(timer, "many rows", 8, 4096, false, 7168, 2048, false, sweep, sms);
    grouped(timer, "many rows, silu", 8, 4096, false, 4096, 7168, true, sweep, sms);
    grouped(timer, "V3 gate_up", 256, 128, true, 4096, 7168, true, sweep, sms);
    grouped(timer, "V3 down", 256, 128, true, 7168, 2048, false, sweep, sms);
    grouped(timer, "V2L gate_up", 64, 768, true, 2816, 2048, true, sweep, sms);
    grouped(timer, "V2L down", 64, 768, true, 2048, 1408, false, sweep, sms);
  }
  if (all || only_dense) dense(timer, sweep, sms);
  if (all || only_experts) experts(timer);
}
