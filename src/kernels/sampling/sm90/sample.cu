// The public operations on scores of tokens (include/flash_mla/sampling.h) on Hopper: row.cuh has tile, threads and memory. A row is
// read once for its likeliest token, and then as row.cuh says.

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "base/cuda/check.h"
#include "base/cuda/device.h"
#include "base/cuda/grid_dependency.cuh"
#include "base/cuda/launch.h"
#include "base/philox.h"
#include "flash_mla/error.h"
#include "kernels/attention/dense_decode/sm90/dense_decode.h"
#include "kernels/sampling/call.h"
#include "kernels/sampling/sm90/scores.cuh"

namespace flash_mla::sm90 {
namespace {

using namespace draws;

/// A vector of integers or floats, or one number for all.
struct Numbers {
  const void* data = nullptr;
  std::int64_t stride = 0;
  DType dtype = DType::kFloat64;

  template <class T>
  __device__ T at(std::int64_t i, T otherwise) const {
    if (data == nullptr) return otherwise;
    switch (dtype) {
      case DType::kInt32:
        return static_cast<T>(static_cast<const std::int32_t*>(data)[i * stride]);
      case DType::kInt64:
        return static_cast<T>(static_cast<const std::int64_t*>(data)[i * stride]);
      case DType::kFloat32:
        return static_cast<T>(static_cast<const float*>(data)[i * stride]);
      default:
        return static_cast<T>(static_cast<const double*>(data)[i * stride]);
    }
  }
};
Numbers numbers(const TensorView& t) {
  if (!t.defined()) return {};
  return {t.data, t.stride(0), t.dtype};
}

/// Where integers go.
struct Integers {
  void* data = nullptr;
  bool wide = false;

  __device__ void put(std::int64_t at, std::int64_t x) const {
    if (data == nullptr) return;
    if (wide) {
      static_cast<std::int64_t*>(data)[at] = x;
    } else {
      static_cast<std::int32_t*>(data)[at] = static_cast<std::int32_t>(x);
    }
  }
};
Integers integers(const TensorView& t) {
  return {t.defined() ? t.data : nullptr, t.defined() && t.dtype == DType::kInt64};
}

struct Limits {
  Numbers temperature, top_k, top_p, min_p;
  double all_temperature, all_top_p, all_min_p;
  std::int64_t all_top_k;
  bool probabilities, joint;
};
Limits limits(const SamplingRows& r, const SamplingOptions& o) {
  return {numbers(r.temperature), numbers(r.top_k), numbers(r.top_p), numbers(r.min_p),
          o.temperature,          o.top_p,          o.min_p,          o.top_k,
          o.probabilities,        o.joint};
}

/// cpu::make_draw of a row's limits, to the bit. `temperature` > 0.
__device__ Draw draw_of(const Limits& l, std::int64_t row, double u, double temperature, int vocab) {
  Draw draw;
  draw.u = u;
  draw.top_p = l.top_p.at(row, l.all_top_p);
  draw.min_weight =
      max(static_cast<u64>(ceil(l.min_p.at(row, l.all_min_p) * static_cast<double>(kDrawOne))), u64{1});
  draw.scale = static_cast<float>(1.0 / fmin(fmax(temperature, 1e-30), 1e30));
  draw.top_k = static_cast<int>(min(max(l.top_k.at(row, l.all_top_k), std::int64_t{0}), std::int64_t{vocab}));
  return draw;
}

struct Keys {
  Numbers seeds, indices, positions;
  std::uint64_t seed, position;

  __device__ double uniform(std::int64_t draw, std::int64_t ahead = 0, std::uint32_t use = 0) const {
    return flash_mla::uniform(seeds.at(draw, seed), indices.at(draw, static_cast<std::uint32_t>(draw)),
                              positions.at(draw, position) + static_cast<std::uint64_t>(ahead), use);
  }
};
Keys keys(const DrawKeys& k, const SamplingOptions& o) {
  return {numbers(k.seeds), numbers(k.indices), numbers(k.positions), o.seed, o.position};
}

/// A row and what it may be cut by, by the whole cluster.
template <class T>
struct CutRow {
  /// `best`: the key of the likeliest token, 0 where none is possible.
  __device__ CutRow(const Scores<T>& scores, int vocab, const Draw& draw, Shared& shared)
      : row(scores, vocab, draw, shared) {
    const u64 key = row.likeliest();
    const float largest = logit_of(key);
    const bool finite = row.scores().possible(largest) && largest < INFINITY;
    best = finite ? key : 0;
    row.scores().largest = largest;
  }
  __device__ int likeliest() const { return static_cast<int>(0xFFFFFFFFu - static_cast<unsigned>(best)); }
  Row<Scores<T>> row;
  u64 best;
};

template <class T>
struct SampleParams {
  const T* scores;
  std::int64_t stride, rows;
  int vocab, blocks;
  Numbers row_of;
  Limits limits;
  Keys keys;
  Integers tokens;
  std::int64_t token_stride;
  std::uint8_t* valid;
  std::int64_t valid_stride;
};

template <class T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleParams<T> p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t i = blockIdx.x / static_cast<unsigned>(p.blocks), row = p.row_of.at(i, i);
  const bool first = threadIdx.x == 0 && blockIdx.x % static_cast<unsigned>(p.blocks) == 0;
  const auto tell = [&](std::int64_t token) {
    p.tokens.put(i * p.token_stride, token);
    if (p.valid != nullptr) p.valid[i * p.valid_stride] = token >= 0 ? 1 : 0;
  };
  if (first) tell(-1);
  if (row < 0 || row >= p.rows) return;
  const double temperature = p.limits.temperature.at(row, p.limits.all_temperature);
  const Draw draw = draw_of(p.limits, row, p.keys.uniform(i), temperature, p.vocab);
  Scores<T> scores{p.scores + row * p.stride};
  scores.probabilities = p.limits.probabilities;
  scores.scale = draw.scale;
  scores.min_weight = draw.min_weight;
  CutRow<T> cut(scores, p.vocab, draw, shared);
  int token = -1;
  if (cut.best == 0 || !(temperature > 0)) {
    if (first && cut.best != 0) token = cut.likeliest();
    cut.row.sync();
  } else {
    token = cut.row.draw(p.limits.joint);
  }
  if (token >= 0 && threadIdx.x == 0) tell(token);
}

template <class T>
struct FilterParams {
  const T* scores;
  std::int64_t stride;
  T* out;
  std::int64_t out_stride;
  int vocab, blocks;
  Limits limits;
};

template <class T>
__global__ void __launch_bounds__(kThreads) filter_kernel(const __grid_constant__ FilterParams<T> p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t row = blockIdx.x / static_cast<unsigned>(p.blocks);
  const double temperature = p.limits.temperature.at(row, p.limits.all_temperature);
  const Draw draw = draw_of(p.limits, row, 0, temperature, p.vocab);
  Scores<T> scores{p.scores + row * p.stride};
  scores.probabilities = p.limits.probabilities;
  scores.scale = draw.scale;
  scores.min_weight = draw.min_weight;
  // Where no weight decides, tokens stay that are too unlikely to be drawn.
  scores.counted = draw.top_p >= 1 && !(p.limits.min_p.at(row, p.limits.all_min_p) > 0);
  CutRow<T> cut(scores, p.vocab, draw, shared);
  u64 threshold = ~u64{0};
  if (cut.best != 0) threshold = temperature > 0 ? cut.row.cut(p.limits.joint) : cut.best;
  const auto stays = [&](float x, int id) {
    return key_of(x, id) >= threshold && cut.row.scores().weight(x) > 0;
  };
  const bool divides = p.limits.probabilities;
  const double sum =
      divides ? cut.row.add_up([&](float x, int id) { return stays(x, id) ? static_cast<double>(x) : 0.0; })
              : 1;
  cut.row.sync();  // out may be scores, which nobody needs but where it is written
  const T none = from_float<T>(divides ? 0.0f : -INFINITY);
  const T* from = scores.row;
  T* out = p.out + row * p.out_stride;
  cut.row.for_all([&](float x, int id) {
    const T kept = divides ? from_float<T>(static_cast<float>(static_cast<double>(x) / sum)) : from[id];
    out[id] = stays(x, id) ? kept : none;
  });
  cut.row.sync();
}

template <class T, class O>
struct SoftmaxParams {
  const T* logits;
  std::int64_t stride;
  O* out;
  std::int64_t out_stride;
  int vocab, blocks;
  Numbers temperature;
  double all_temperature;
};

template <class T, class O>
__global__ void __launch_bounds__(kThreads) softmax_kernel(const __grid_constant__ SoftmaxParams<T, O> p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t row = blockIdx.x / static_cast<unsigned>(p.blocks);
  const double temperature = p.temperature.at(row, p.all_temperature);
  CutRow<T> cut(Scores<T>{p.logits + row * p.stride}, p.vocab, Draw{}, shared);
  const double largest = static_cast<double>(cut.row.scores().largest);
  const auto power = [&](float x, int id) {
    if (!(temperature > 0)) return id == cut.likeliest() ? 1.0f : 0.0f;
    return static_cast<float>(exp((static_cast<double>(x) - largest) / temperature));
  };
  const double sum = cut.row.add_up([&](float x, int id) { return static_cast<double>(power(x, id)); });
  O* out = p.out + row * p.out_stride;
  cut.row.for_all([&](float x, int id) {
    out[id] = from_float<O>(static_cast<float>(static_cast<double>(power(x, id)) / sum));
  });
  cut.row.sync();
}

/// Rows of a tensor (b, n, vocab), or elements of one (b, n).
template <class T>
struct Grid {
  T* data;
  std::int64_t chain, step;
  __device__ T* at(std::int64_t c, std::int64_t i) const { return data + c * chain + i * step; }
};

template <class T>
struct SpeculativeParams {
  Grid<const T> draft, target;
  const void* drafts;
  bool wide_drafts;
  std::int64_t draft_chain, draft_step;
  Keys keys;
  Integers tokens;
  std::int64_t token_chain, token_step;
  Integers accepted, emitted;
  std::int64_t accepted_stride, emitted_stride, n;
  int vocab, blocks;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    speculative_kernel(const __grid_constant__ SpeculativeParams<T> p) {
  __shared__ Shared shared;
  ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
  const std::int64_t chain = blockIdx.x / static_cast<unsigned>(p.blocks);
  const bool first = threadIdx.x == 0 && blockIdx.x % static_cast<unsigned>(p.blocks) == 0;
  const auto put = [&](std::int64_t i, std::int64_t token) {
    p.tokens.put(chain * p.token_chain + i * p.token_step, token);
  };
  std::int64_t emitted = p.n, accepted = 0;
  for (std::int64_t i = 0; i < p.n; ++i) {
    const std::int64_t where = chain * p.draft_chain + i * p.draft_step;
    const std::int64_t token = p.wide_drafts ? static_cast<const std::int64_t*>(p.drafts)[where]
                                             : static_cast<const std::int32_t*>(p.drafts)[where];
    bool accept = false;
    if (token >= 0 && token < p.vocab) {
      const double draft = static_cast<double>(as_float(p.draft.at(chain, i)[token])),
                   target = static_cast<double>(as_float(p.target.at(chain, i)[token]));
      accept = __dmul_rn(p.keys.uniform(chain, i), draft) < target;
    }
    accepted += accept ? 1 : 0;
    if (!accept) emitted = min(emitted, i);
    if (first && i < emitted) put(i, token);
  }
  if (first) {
    for (std::int64_t i = emitted; i <= p.n; ++i) put(i, -1);
    p.accepted.put(chain * p.accepted_stride, accepted);
    p.emitted.put(chain * p.emitted_stride, emitted);
  }
  Scores<T> scores{p.target.at(chain, emitted)};
  scores.probabilities = true;
  if (emitted < p.n) scores.minus = p.draft.at(chain, emitted);
  Draw draw;
  draw.u = p.keys.uniform(chain, emitted, emitted < p.n ? kReplacesDraft : 0);
  CutRow<T> cut(scores, p.vocab, draw, shared);
  if (cut.best == 0) {
    // Nothing is left where both are one distribution but for rounding: then it is the target's.
    cut.row.scores().minus = nullptr;
    cut.row.scores().largest = logit_of(cut.row.likeliest());
  }
  const int token = cut.row.draw();
  if (token >= 0 && threadIdx.x == 0) put(emitted, token);
}

template <class Params>
void launch_rows(void (*kernel)(Params), Params& p, std::int64_t rows, void* stream, const char* name) {
  p.blocks = blocks_of_row(rows);
  LaunchConfig config(dim3(static_cast<unsigned>(rows * p.blocks)), kThreads, 0,
                      static_cast<cudaStream_t>(stream));
  config.cluster(static_cast<unsigned>(p.blocks)).programmatic();
  check(launch(config, kernel, p), name);
}

/// A device that this backend runs on, and so few rows that a grid takes them.
void check_rows(const TensorView& t, std::int64_t rows, const char* name) {
  require_device(t.device.index);
  if (rows <= INT32_MAX / kMaxBlocks) return;
  throw Unsupported(std::string(name) + " is " + t.describe() +
                    "; the sm90 backend takes up to 268435455 rows");
}

/// f(element) of scores' type.
template <class F>
void visit(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) {
    f(Bf16{});
  } else if (dtype == DType::kFloat16) {
    f(Fp16{});
  } else {
    f(float{});
  }
}

}  // namespace

void sample_tokens(const SampleArgs& a, const SamplingOptions& options) {
  check_rows(a.tokens, a.tokens.size(0), "tokens");
  const DeviceGuard guard(a.scores.device.index);
  visit(a.scores.dtype, [&]<class T>(T) {
    SampleParams<T> p{};
    p.scores = a.scores.ptr<const T>();
    p.stride = a.scores.stride(0);
    p.rows = a.scores.size(0);
    p.vocab = static_cast<int>(a.scores.size(1));
    p.row_of = numbers(a.rows);
    p.limits = limits(a.options, options);
    p.keys = keys(a.keys, options);
    p.tokens = integers(a.tokens);
    p.token_stride = a.tokens.stride(0);
    if (a.valid.defined()) {
      p.valid = a.valid.ptr<std::uint8_t>();
      p.valid_stride = a.valid.stride(0);
    }
    launch_rows(sample_kernel<T>, p, a.tokens.size(0), options.stream, "sample_kernel");
  });
}

void filter_tokens(const TensorView& scores, const SamplingRows& rows, const TensorView& out,
                   const SamplingOptions& options) {
  check_rows(scores, scores.size(0), "scores");
  const DeviceGuard guard(scores.device.index);
  visit(scores.dtype, [&]<class T>(T) {
    FilterParams<T> p{};
    p.scores = scores.ptr<const T>();
    p.stride = scores.stride(0);
    p.out = out.ptr<T>();
    p.out_stride = out.stride(0);
    p.vocab = static_cast<int>(scores.size(1));
    p.limits = limits(rows, options);
    launch_rows(filter_kernel<T>, p, scores.size(0), options.stream, "filter_kernel");
  });
}

void token_probabilities(const TensorView& logits, const SamplingRows& rows, const TensorView& out,
                         const SamplingOptions& options) {
  check_rows(logits, logits.size(0), "logits");
  const DeviceGuard guard(logits.device.index);
  visit(logits.dtype, [&]<class T>(T) {
    const auto run = [&]<class O>(O) {
      SoftmaxParams<T, O> p{};
      p.logits = logits.ptr<const T>();
      p.stride = logits.stride(0);
      p.out = out.ptr<O>();
      p.out_stride = out.stride(0);
      p.vocab = static_cast<int>(logits.size(1));
      p.temperature = numbers(rows.temperature);
      p.all_temperature = options.temperature;
      launch_rows(softmax_kernel<T, O>, p, logits.size(0), options.stream, "softmax_kernel");
    };
    if (out.dtype == DType::kFloat32) {
      run(float{});
    } else {
      run(T{});
    }
  });
}

void speculative_sampling(const SpeculativeArgs& a, const SamplingOptions& options) {
  check_rows(a.draft_probs, a.draft_probs.size(0), "draft_probs");
  const DeviceGuard guard(a.draft_probs.device.index);
  visit(a.draft_probs.dtype, [&]<class T>(T) {
    SpeculativeParams<T> p{};
    p.draft = {a.draft_probs.ptr<const T>(), a.draft_probs.stride(0), a.draft_probs.stride(1)};
    p.target = {a.target_probs.ptr<const T>(), a.target_probs.stride(0), a.target_probs.stride(1)};
    p.drafts = a.draft_tokens.data;
    p.wide_drafts = a.draft_tokens.dtype == DType::kInt64;
    p.draft_chain = a.draft_tokens.stride(0);
    p.draft_step = a.draft_tokens.stride(1);
    p.keys = keys(a.keys, options);
    p.tokens = integers(a.tokens);
    p.token_chain = a.tokens.stride(0);
    p.token_step = a.tokens.stride(1);
    p.accepted = integers(a.accepted);
    p.emitted = integers(a.emitted);
    p.accepted_stride = a.accepted.defined() ? a.accepted.stride(0) : 0;
    p.emitted_stride = a.emitted.defined() ? a.emitted.stride(0) : 0;
    p.n = a.draft_probs.size(1);
    p.vocab = static_cast<int>(a.draft_probs.size(2));
    launch_rows(speculative_kernel<T>, p, a.draft_probs.size(0), options.stream, "speculative_kernel");
  });
}

}  // namespace flash_mla::sm90
