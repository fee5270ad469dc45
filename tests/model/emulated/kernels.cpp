// The model's kernels, each as its header says it, in loops over the host's memory.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/element.h"
#include "base/fp8.h"
#include "base/page_size.h"
#include "base/parallel.h"
#include "kernels/attention/plain/sm90/plain_attention.h"
#include "kernels/fused/sm90/one_token.h"
#include "kernels/gemm/sm90/cublaslt.h"
#include "kernels/gemm/sm90/head_gemm.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/gemm/sm90/skinny_gemm.h"
#include "kernels/gemm/sm90/widen_weights.h"
#include "kernels/moe/cpu/router.h"
#include "kernels/moe/sm90/moe.h"
#include "kernels/moe/sm90/norm_route.h"
#include "kernels/rows/sm90/index_rows.h"
#include "kernels/rows/sm90/rows.h"
#include "kernels/sampling/cpu/draw.h"
#include "kernels/sampling/sm90/draw_rows.h"
#include "kernels/sampling/sm90/token_rules.h"
#include "queue.h"

namespace flash_mla::sm90 {

using emulated::queue;

namespace {

using Values = std::vector<float>;

Bf16* elements(const Matrix& m, std::int64_t row) { return reinterpret_cast<Bf16*>(m.row(row)); }

Values wide(const Bf16* from, std::int64_t n) {
  Values out(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i) out[static_cast<std::size_t>(i)] = to_float(from[i]);
  return out;
}

template <class F>
void rows_of(std::int64_t rows, F&& f) {
  parallel_for(rows, rows >= 4 ? default_threads() : 1, f);
}

float dot(const float* x, const Bf16* w, std::int64_t n) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * to_float(w[i]);
  return sum;
}
float dot(const float* x, const float* w, std::int64_t n) {
  float sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i] * w[i];
  return sum;
}

/// Weights (matrices, rows, columns) in bfloat16, or in e4m3 where they have scales (SkinnyGemm::weight_scales).
struct Weights {
  const void* values;
  const float* scales;
  std::int64_t rows, columns;
  bool int4 = false;

  /// x times row n of a matrix.
  float dot_row(const float* x, std::int64_t matrix, std::int64_t n) const {
    const std::int64_t at = (matrix * rows + n) * columns;
    if (scales == nullptr) return dot(x, static_cast<const Bf16*>(values) + at, columns);
    if (int4) return int4_dot_row(x, matrix, n);
    const auto* codes = static_cast<const E4m3*>(values) + at;
    const std::int64_t scale_rows = (rows + kE4m3ScaleRows - 1) / kE4m3ScaleRows;
    const std::int64_t scale_columns = (columns + kE4m3ScaleColumns - 1) / kE4m3ScaleColumns;
    const float* own = scales + (matrix * scale_rows + n / kE4m3ScaleRows) * scale_columns;
    float sum = 0;
    for (std::int64_t i = 0; i < columns; ++i) sum += x[i] * to_float(codes[i]) * own[i / kE4m3ScaleColumns];
    return sum;
  }

  float int4_dot_row(const float* x, std::int64_t matrix, std::int64_t n) const {
    const auto* words = static_cast<const std::uint32_t*>(values) + matrix * rows * columns / 8;
    const std::int64_t groups = (columns + kInt4ScaleColumns - 1) / kInt4ScaleColumns;
    float sum = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      const std::uint32_t code = words[int4_word(n, i, columns)] >> (4 * int4_place(i)) & 15u;
      const float scale = scales[(matrix * groups + i / kInt4ScaleColumns) * rows + n];
      sum += x[i] * (static_cast<float>(code) - 8.0f) * scale;
    }
    return sum;
  }
};

float silu(float x) { return x / (1 + std::exp(-x)); }

void norm(const Bf16* x, const float* weight, float eps, std::int64_t n, Bf16* out) {
  float squares = 0;
  for (std::int64_t i = 0; i < n; ++i) squares += to_float(x[i]) * to_float(x[i]);
  const float factor = 1 / std::sqrt(squares / static_cast<float>(n) + eps);
  for (std::int64_t i = 0; i < n; ++i) out[i] = to_bf16(to_float(x[i]) * factor * weight[i]);
}

void turn(const Bf16* from, Bf16* to, float cosine, float sine) {
  const float a = to_float(from[0]), b = to_float(from[1]);
  to[0] = to_bf16(a * cosine - b * sine);
  to[1] = to_bf16(b * cosine + a * sine);
}

}  // namespace

void embed(const std::byte* table, const std::int32_t* ids, const std::int32_t* tokens,
           const std::int32_t* positions, const RotationTable& rotations, Matrix out, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < out.rows; ++t) {
      std::int64_t id = ids[t];
      if (id < 0) id = std::max(tokens[-1 - id], 0);
      std::memcpy(out.row(t), table + id * out.columns * 2, static_cast<std::size_t>(out.columns * 2));
      for (int i = 0; i < rotations.pairs; ++i) {
        const float angle = static_cast<float>(positions[t]) * rotations.inv_freq[i];
        rotations.cosines[t * rotations.pairs + i] = std::cos(angle) * rotations.scale;
        rotations.sines[t * rotations.pairs + i] = std::sin(angle) * rotations.scale;
      }
    }
  });
}

void rms_norm(Matrix x, const float* weight, float eps, Matrix out, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < x.rows; ++t) norm(elements(x, t), weight, eps, x.columns, elements(out, t));
  });
}

void silu_mul(Matrix gate_up, Matrix out, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < out.rows; ++t) {
      const Bf16* gate = elements(gate_up, t);
      for (std::int64_t i = 0; i < out.columns; ++i) {
        elements(out, t)[i] = to_bf16(silu(to_float(gate[i])) * to_float(gate[out.columns + i]));
      }
    }
  });
}

void rope_and_append(const RopeAndAppend& a, cudaStream_t) {
  queue([=] {
    const std::int64_t pairs = a.rope / 2;
    for (std::int64_t t = 0; t < a.q.rows; ++t) {
      const float* cosines = a.rotations.cosines + t * pairs;
      const float* sines = a.rotations.sines + t * pairs;
      for (std::int64_t head = 0; head < a.heads; ++head) {
        Bf16* x = elements(a.q, t) + head * (a.nope + a.rope) + a.nope;
        for (std::int64_t i = 0; i < pairs; ++i) turn(x + 2 * i, x + 2 * i, cosines[i], sines[i]);
      }
      const std::int64_t slot = a.slots != nullptr ? a.slots[t] : t;
      if (slot < 0) continue;
      const Bf16* kv = elements(a.kv, t);
      Bf16* key = reinterpret_cast<Bf16*>(a.cache) + slot * (a.rank + a.rope);
      norm(kv, a.kv_norm, a.eps, a.rank, key);
      for (std::int64_t i = 0; i < pairs; ++i)
        turn(kv + a.rank + 2 * i, key + a.rank + 2 * i, cosines[i], sines[i]);
    }
  });
}

void gather(Matrix x, const std::int32_t* rows, Matrix out, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < out.rows; ++t) {
      std::memcpy(out.row(t), x.row(rows[t]), static_cast<std::size_t>(out.columns * 2));
    }
  });
}

void add_bias(const float* bias, bool replace, Matrix inout, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < inout.rows; ++t) {
      Bf16* row = elements(inout, t);
      for (std::int64_t i = 0; i < inout.columns; ++i)
        row[i] = to_bf16(bias[i] + (replace ? 0 : to_float(row[i])));
    }
  });
}

std::size_t likeliest_scratch_bytes(std::int64_t rows) { return static_cast<std::size_t>(rows) * 16; }

void likeliest(Matrix x, std::int32_t* tokens, std::byte*, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const auto* row = reinterpret_cast<const float*>(x.row(t));
      const float* best = std::max_element(row, row + x.columns);
      const bool bad = std::any_of(row, row + x.columns, [](float v) { return !(v < INFINITY); });
      tokens[t] = bad || *best == -INFINITY ? -1 : static_cast<std::int32_t>(best - row);
    }
  });
}

void gather_keys(const GatherKeys& a, cudaStream_t) {
  queue([=] {
    const std::int64_t width = a.rank + a.rope;
    for (int s = 0; s < a.num_seqs; ++s) {
      for (std::int64_t key = a.starts[s]; key < a.starts[s + 1]; ++key) {
        const std::int64_t position = key - a.starts[s];
        const std::int64_t page = a.pages[a.tables[s] + position / kPageSize];
        const std::byte* from = a.cache + (page * kPageSize + position % kPageSize) * width * 2;
        std::memcpy(a.latents + key * a.rank * 2, from, static_cast<std::size_t>(a.rank) * 2);
        std::memcpy(a.k_rope + key * a.rope * 2, from + std::ptrdiff_t{2} * a.rank,
                    static_cast<std::size_t>(a.rope) * 2);
      }
    }
  });
}

void fill_random(std::byte* out, DType dtype, std::int64_t count, std::uint64_t seed, float deviation,
                 cudaStream_t) {
  queue([=] {
    std::uint64_t state = seed;
    for (std::int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const float x = (static_cast<float>(state >> 40) * 0x1p-24f - 0.5f) * 3.4641016f * deviation;
      if (dtype == DType::kBFloat16) {
        reinterpret_cast<Bf16*>(out)[i] = to_bf16(x);
      } else {
        reinterpret_cast<float*>(out)[i] = x;
      }
    }
  });
}

void norm_and_rotate_index_keys(Matrix k, const float* weight, const float* bias, float eps,
                                const IndexRotation& rotation, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < k.rows; ++t) {
      Bf16* row = elements(k, t);
      const Values x = wide(row, k.columns);
      float sum = 0, squares = 0;
      for (const float v : x) sum += v;
      const float mean = sum / static_cast<float>(k.columns);
      for (const float v : x) squares += (v - mean) * (v - mean);
      const float factor = 1 / std::sqrt(squares / static_cast<float>(k.columns) + eps);
      for (std::size_t i = 0; i < x.size(); ++i)
        row[i] = to_bf16((x[i] - mean) * factor * weight[i] + bias[i]);
      for (std::int64_t i = 0; i < rotation.pairs; ++i) {
        const std::int64_t at = t * rotation.pairs + i;
        turn(row + 2 * i, row + 2 * i, rotation.cosines[at], rotation.sines[at]);
      }
    }
  });
}

void rotate_index_queries(Matrix q, int dim, const IndexRotation& rotation, cudaStream_t) {
  queue([=] {
    for (std::int64_t t = 0; t < q.rows; ++t) {
      for (std::int64_t head = 0; head < q.columns / dim; ++head) {
        Bf16* x = elements(q, t) + head * dim;
        for (std::int64_t i = 0; i < rotation.pairs; ++i) {
          const std::int64_t at = t * rotation.pairs + i;
          turn(x + 2 * i, x + 2 * i, rotation.cosines[at], rotation.sines[at]);
        }
      }
    }
  });
}

cudaError_t skinny_gemm(const SkinnyGemm& a, cudaStream_t) {
  queue([=] {
    const std::int64_t outputs = a.silu_mul ? a.n / 2 : a.n;
    const Weights weights{a.weight, a.weight_scales, a.n, a.k};
    rows_of(a.m, [&](std::int64_t t) {
      const Values x = wide(static_cast<const Bf16*>(a.x) + t * a.x_stride, a.k);
      const auto product = [&](std::int64_t n) {
        const float bias = a.bias != nullptr ? a.bias[n] : 0;
        return bias + (a.weight_fp32 ? dot(x.data(), static_cast<const float*>(a.weight) + n * a.k, a.k)
                                     : weights.dot_row(x.data(), 0, n));
      };
      for (std::int64_t n = 0; n < outputs; ++n) {
        float value = a.silu_mul ? silu(product(n)) * product(outputs + n) : product(n);
        if (a.out_fp32) {
          float& to = static_cast<float*>(a.out)[t * a.out_stride + n];
          to = value + (a.accumulate ? to : 0);
        } else {
          Bf16& to = static_cast<Bf16*>(a.out)[t * a.out_stride + n];
          to = to_bf16(value + (a.accumulate ? to_float(to) : 0));
        }
      }
    });
  });
  return cudaSuccess;
}

void head_gemm(const HeadGemm& a, cudaStream_t) {
  queue([=] {
    rows_of(a.x.rows, [&](std::int64_t t) {
      const std::int64_t pairs = a.tail / 2;
      for (std::int64_t head = 0; head < a.heads; ++head) {
        const Bf16* x = elements(a.x, t) + head * a.x_width;
        Bf16* out = elements(a.out, t) + head * a.out_width;
        const Values row = wide(x, a.in_features);
        const Bf16* weight = reinterpret_cast<const Bf16*>(a.weight) + head * a.out_features * a.in_features;
        for (std::int64_t n = 0; n < a.out_features; ++n) {
          out[n] = to_bf16(dot(row.data(), weight + n * a.in_features, a.in_features));
        }
        for (std::int64_t i = 0; i < a.tail; ++i) out[a.out_features + i] = x[a.in_features + i];
        for (std::int64_t i = 0; i < pairs && a.cosines != nullptr; ++i) {
          turn(x + a.in_features + 2 * i, out + a.out_features + 2 * i, a.cosines[t * pairs + i],
               a.sines[t * pairs + i]);
        }
      }
      if (a.append.cache == nullptr || a.cosines == nullptr) return;
      const std::int64_t slot = a.append.slots != nullptr ? a.append.slots[t] : t;
      if (slot < 0) return;
      const Bf16* kv = elements(a.append.kv, t);
      Bf16* key = reinterpret_cast<Bf16*>(a.append.cache) + slot * (a.append.rank + a.tail);
      norm(kv, a.append.norm, a.append.eps, a.append.rank, key);
      for (std::int64_t i = 0; i < pairs; ++i) {
        turn(kv + a.append.rank + 2 * i, key + a.append.rank + 2 * i, a.cosines[t * pairs + i],
             a.sines[t * pairs + i]);
      }
    });
  });
}

struct CublasLt::Impl {};
CublasLt::CublasLt() = default;
CublasLt::~CublasLt() = default;
std::string why_no_cublaslt() { return ""; }

void CublasLt::gemm(Matrix x, const std::byte* weight, Matrix out, bool accumulate, cudaStream_t stream) {
  SkinnyGemm args;
  args.x = x.data;
  args.x_stride = x.stride;
  args.weight = weight;
  args.out = out.data;
  args.out_stride = out.stride;
  args.m = x.rows;
  args.n = out.columns;
  args.k = x.columns;
  args.out_fp32 = out.dtype == DType::kFloat32;
  args.accumulate = accumulate;
  skinny_gemm(args, stream);
}

cudaError_t choose_experts(const RouteArgs& a, cudaStream_t) {
  queue([=] {
    const Routing& r = a.routing;
    const std::int64_t all = r.experts_per_token + r.shared_experts;
    for (std::int64_t t = 0; t < a.tokens; ++t) {
      cpu::choose_experts(r, a.logits + t * r.num_experts, a.correction, a.ids + t * all,
                          a.weights + t * all);
      for (int s = 0; s < r.shared_experts; ++s) {
        a.ids[t * all + r.experts_per_token + s] = r.num_experts + s;
        a.weights[t * all + r.experts_per_token + s] = 1;
      }
    }
  });
  return cudaSuccess;
}

cudaError_t route(const RouteArgs& a, cudaStream_t stream) {
  SkinnyGemm logits;
  logits.x = a.x;
  logits.x_stride = a.x_stride;
  logits.weight = a.router;
  logits.out = a.logits;
  logits.out_stride = a.routing.num_experts;
  logits.m = a.tokens;
  logits.n = a.routing.num_experts;
  logits.k = a.hidden;
  logits.out_fp32 = logits.weight_fp32 = true;
  skinny_gemm(logits, stream);
  return choose_experts(a, stream);
}

bool fits_norm_and_route(const NormAndRoute&) { return false; }
void norm_and_route(const NormAndRoute&, cudaStream_t) {}

std::size_t expert_ffn_workspace_size(std::int64_t, std::int64_t, std::int64_t, int, int) { return 256; }

cudaError_t expert_ffn(const ExpertFfn& a, cudaStream_t) {
  queue([=] {
    const Weights gate_up{a.gate_up, a.gate_up_scales, 2 * a.intermediate, a.hidden, a.int4};
    const Weights down{a.down, a.down_scales, a.hidden, a.intermediate, a.int4};
    rows_of(a.tokens, [&](std::int64_t t) {
      const Values x = wide(static_cast<const Bf16*>(a.x) + t * a.x_stride, a.hidden);
      auto* inout = static_cast<Bf16*>(a.inout) + t * a.inout_stride;
      Values sum = wide(inout, a.hidden), act(static_cast<std::size_t>(a.intermediate));
      for (int i = 0; i < a.experts_per_token; ++i) {
        const std::int64_t e = a.ids[t * a.experts_per_token + i];
        if (e < 0 && a.of_experts > 0) continue;
        for (std::int64_t n = 0; n < a.intermediate; ++n) {
          const float gate = gate_up.dot_row(x.data(), e, n);
          const float up = gate_up.dot_row(x.data(), e, a.intermediate + n);
          act[static_cast<std::size_t>(n)] = to_float(to_bf16(silu(gate) * up));
        }
        const float weight = a.weights[t * a.experts_per_token + i];
        for (std::int64_t n = 0; n < a.hidden; ++n) {
          sum[static_cast<std::size_t>(n)] += weight * down.dot_row(act.data(), e, n);
        }
      }
      for (std::int64_t n = 0; n < a.hidden; ++n) inout[n] = to_bf16(sum[static_cast<std::size_t>(n)]);
      if (a.norm != nullptr) {
        norm(inout, a.norm, a.norm_eps, a.hidden, static_cast<Bf16*>(a.norm_out) + t * a.norm_stride);
      }
    });
  });
  return cudaSuccess;
}

cudaError_t widen_weights(const WidenWeights& a, cudaStream_t) {
  queue([=] {
    const std::int64_t scale_columns = (a.columns + kE4m3ScaleColumns - 1) / kE4m3ScaleColumns;
    for (std::int64_t i = 0; i < a.rows * a.columns; ++i) {
      const std::int64_t row = i / a.columns, column = i % a.columns;
      const float scale = a.scales[row / kE4m3ScaleRows * scale_columns + column / kE4m3ScaleColumns];
      static_cast<Bf16*>(a.out)[i] = to_bf16(to_float(static_cast<const E4m3*>(a.codes)[i]) * scale);
    }
  });
  return cudaSuccess;
}
cudaError_t fill_random_e4m3(void* codes, std::int64_t count, std::uint64_t seed, cudaStream_t) {
  queue([=] {
    std::uint64_t state = seed;
    for (std::int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      // Even over an interval of deviation 1.
      const float x = (static_cast<float>(state >> 40) * 0x1p-24f - 0.5f) * 3.46f;
      static_cast<E4m3*>(codes)[i] = to_e4m3(x * kRandomE4m3Deviation);
    }
  });
  return cudaSuccess;
}

cudaError_t fill_random_int4(void* codes, std::int64_t words, std::uint64_t seed, cudaStream_t) {
  queue([=] {
    std::uint64_t state = seed;
    for (std::int64_t i = 0; i < 8 * words; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      std::uint32_t& word = static_cast<std::uint32_t*>(codes)[i / 8];
      if (i % 8 == 0) word = 0;
      word |= static_cast<std::uint32_t>(1 + (state >> 40) % 15) << (4 * (i % 8));
    }
  });
  return cudaSuccess;
}

bool fits_one_token(const OneToken&, bool, bool) { return false; }
std::size_t one_token_workspace_size() { return 256; }
cudaError_t one_token(const OneToken&, cudaStream_t) { return cudaErrorInvalidValue; }

void draw_rows(Matrix logits, const Draw* draws, std::int32_t* tokens, cudaStream_t) {
  queue([=] {
    cpu::DrawScratch scratch;
    for (std::int64_t t = 0; t < logits.rows; ++t) {
      if (!(draws[t].scale > 0) || tokens[t] < 0) continue;
      const std::span row(reinterpret_cast<const float*>(logits.row(t)),
                          static_cast<std::size_t>(logits.columns));
      tokens[t] = cpu::draw_token(row, *std::ranges::max_element(row), draws[t], scratch);
    }
  });
}

void apply_token_rules(Matrix logits, const TokenRules& rules, cudaStream_t) {
  queue([=] {
    const auto columns = static_cast<std::size_t>(logits.columns);
    for (std::int64_t i = 0; i < rules.num_rows; ++i) {
      const RuledRow& rule = rules.rows[i];
      const std::span row(reinterpret_cast<float*>(logits.row(rule.row)), columns);
      const Values before(row.begin(), row.end());
      TokenRule all{nullptr, {rules.biases + rule.first_bias, static_cast<std::size_t>(rule.num_biases)}};
      if (rule.mask >= 0)
        all.allowed = rules.masks + static_cast<std::size_t>(rule.mask) * ((columns + 31) / 32);
      cpu::apply_rule(row, all);
      for (std::size_t k = 0; k < columns; ++k) {
        if (!(before[k] < INFINITY)) row[k] = before[k];
      }
    }
  });
}

}  // namespace flash_mla::sm90
