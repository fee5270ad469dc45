#pragma once

// Experts of a layer with random weights, in bfloat16, e4m3 or int4, and what they make of tokens in fp64 sums on the host.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "base/fp8.h"
#include "kernels/gemm/sm90/int4_weights.h"
#include "kernels/moe/sm90/moe.h"
#include "model_data.h"

namespace flash_mla::gpu_test {

struct Layer {
  int hidden, intermediate, experts, chosen;
};

/// Matrices of codes and scales.
class ScaledMatrices {
 public:
  virtual ~ScaledMatrices() = default;
  /// What a weight means, not rounded.
  virtual double at(std::size_t matrix, std::size_t row, std::size_t column) const = 0;
};

/// bfloat16 weights (matrices, rows, columns) as e4m3 codes with a scale for every 8 rows and 128 columns of each.
struct E4m3Matrices : ScaledMatrices {
  /// Replaces the weights by what the codes mean, rounded to bfloat16. A few become 40 times as large; scales are what the
  /// largest asks for, or with `powers` the next power of two.
  E4m3Matrices(Random& random, std::vector<std::uint16_t>& weights, int matrices, int rows, int columns,
               bool powers)
      : num_rows(rows),
        num_columns(columns),
        codes_host(weights.size()),
        scales_host(make(random, weights, matrices, rows, columns, powers)) {}

  std::vector<float> make(Random& random, std::vector<std::uint16_t>& weights, int matrices, int rows,
                          int columns, bool powers) {
    const int scale_rows = (rows + 7) / 8, scale_columns = (columns + 127) / 128;
    std::vector<float> out(std::size_t(matrices) * scale_rows * scale_columns);
    const auto scale_of = [&](std::size_t i) -> float& {
      const std::size_t row = i / columns;
      return out[(row / rows * scale_rows + row % rows / 8) * scale_columns + i % columns / 128];
    };
    std::vector<float> wide(weights.size());
    for (std::size_t i = 0; i < wide.size(); ++i) {
      wide[i] = from_bf16(weights[i]) * (random.below(1000) == 0 ? 40.0f : 1.0f);
      scale_of(i) = std::max(scale_of(i), std::abs(wide[i]));
    }
    for (float& s : out) {
      s = s > 0 ? s / kE4m3Max : 1;
      if (powers) s = next_power_of_two(s);
    }
    for (std::size_t i = 0; i < wide.size(); ++i) {
      const E4m3 code = to_e4m3(wide[i] / scale_of(i));
      codes_host[i] = code.bits;
      weights[i] = to_bf16(to_float(code) * scale_of(i));
    }
    return out;
  }

  /// What a code means, without and with its scale, not rounded.
  static double value(std::uint8_t code) {
    static const std::array<double, 256> kValues = [] {
      std::array<double, 256> out;
      for (int i = 0; i < 256; ++i)
        out[std::size_t(i)] = double(to_float(E4m3{static_cast<std::uint8_t>(i)}));
      return out;
    }();
    return kValues[code];
  }
  double at(std::size_t matrix, std::size_t row, std::size_t column) const override {
    const std::size_t rows = std::size_t(num_rows), columns = std::size_t(num_columns);
    const std::size_t scale_row = matrix * ((rows + 7) / 8) + row / 8;
    return value(codes_host[(matrix * rows + row) * columns + column]) *
           double(scales_host[scale_row * ((columns + 127) / 128) + column / 128]);
  }

  int num_rows, num_columns;
  std::vector<std::uint8_t> codes_host;
  std::vector<float> scales_host;
  OnDevice<std::uint8_t> codes{codes_host};
  OnDevice<float> scales{scales_host};
};

/// The same as int4 codes with a scale for every row and 128 columns, as the kernels take them.
struct Int4Matrices : ScaledMatrices {
  /// Replaces the weights by what the codes mean, rounded to bfloat16. A few become 40 times as large.
  Int4Matrices(Random& random, std::vector<std::uint16_t>& weights, int matrices, int rows, int columns)
      : num_rows(rows),
        num_columns(columns),
        words_host(weights.size() / 8),
        scales_host(make(random, weights, matrices)) {}

  std::vector<float> make(Random& random, std::vector<std::uint16_t>& weights, int matrices) {
    const std::size_t columns = std::size_t(num_columns);
    std::vector<float> out(std::size_t(matrices) * groups() * std::size_t(num_rows));
    std::vector<float> group;
    for (std::size_t row = 0; row < std::size_t(matrices) * std::size_t(num_rows); ++row) {
      const std::size_t matrix = row / std::size_t(num_rows), of_matrix = row % std::size_t(num_rows);
      for (std::size_t begin = 0; begin < columns; begin += 128) {
        const std::size_t end = std::min(columns, begin + 128);
        float most = 0;
        group.clear();
        for (std::size_t i = begin; i < end; ++i) {
          group.push_back(from_bf16(weights[row * columns + i]) * (random.below(1000) == 0 ? 40.0f : 1.0f));
          most = std::max(most, std::abs(group.back()));
        }
        const float scale = most > 0 ? most / 7.5f : 1;
        out[scale_at(matrix, of_matrix, begin)] = scale;
        for (std::size_t i = begin; i < end; ++i) {
          const float code = std::clamp(std::nearbyint(group[i - begin] / scale), -8.0f, 7.0f);
          const auto bits = std::uint32_t(int(code) + 8) << (4 * sm90::int4_place(std::int64_t(i)));
          words_host[word_at(matrix, of_matrix, i)] |= bits;
          weights[row * columns + i] = to_bf16(code * scale);
        }
      }
    }
    return out;
  }

  std::size_t groups() const { return std::size_t(num_columns + 127) / 128; }
  std::size_t scale_at(std::size_t matrix, std::size_t row, std::size_t column) const {
    return (matrix * groups() + column / 128) * std::size_t(num_rows) + row;
  }
  std::size_t word_at(std::size_t matrix, std::size_t row, std::size_t column) const {
    return matrix * std::size_t(num_rows) * std::size_t(num_columns) / 8 +
           std::size_t(sm90::int4_word(std::int64_t(row), std::int64_t(column), num_columns));
  }
  double at(std::size_t matrix, std::size_t row, std::size_t column) const override {
    const std::uint32_t word = words_host[word_at(matrix, row, column)];
    const int code = int(word >> (4 * sm90::int4_place(std::int64_t(column))) & 15u) - 8;
    return code * double(scales_host[scale_at(matrix, row, column)]);
  }

  int num_rows, num_columns;
  std::vector<std::uint32_t> words_host;
  std::vector<float> scales_host;
  OnDevice<std::uint32_t> words{words_host};
  OnDevice<float> scales{scales_host};
};

/// Weights of a layer and the tokens of a step.
struct Experts {
  Experts(Random& random, Layer l, int tokens, int favourite = -1, int pad = 0)
      : layer(l),
        gate_up(random.bf16(std::size_t(l.experts) * 2 * l.intermediate * l.hidden,
                            1 / std::sqrt(float(l.hidden)))),
        down(random.bf16(std::size_t(l.experts) * l.intermediate * l.hidden,
                         1 / std::sqrt(float(l.intermediate)))),
        x(random.bf16(std::size_t(tokens) * (l.hidden + pad), 1.0f)),
        before(random.bf16(std::size_t(tokens) * (l.hidden + pad), 1.0f)),
        weights(random.fp32(std::size_t(tokens) * l.chosen, 0.5f)),
        gate_up_device(gate_up),
        down_device(down),
        x_device(x),
        inout(before),
        weights_device(weights),
        ids(choose(random, l, tokens, favourite)),
        ids_device(ids),
        workspace(sm90::expert_ffn_workspace_size(tokens, l.hidden, l.intermediate, l.experts, l.chosen)) {
    args.x = x_device.get();
    args.x_stride = args.inout_stride = l.hidden + pad;
    args.gate_up = gate_up_device.get();
    args.down = down_device.get();
    args.ids = ids_device.get();
    args.weights = weights_device.get();
    args.inout = inout.get();
    args.tokens = tokens;
    args.hidden = l.hidden;
    args.intermediate = l.intermediate;
    args.num_experts = l.experts;
    args.experts_per_token = l.chosen;
    args.workspace = workspace.get();
  }

  /// Distinct experts for every token; `favourite` always among them, if any.
  static std::vector<std::int32_t> choose(Random& random, Layer l, int tokens, int favourite) {
    std::vector<std::int32_t> ids, all(std::size_t(l.experts));
    for (int t = 0; t < tokens; ++t) {
      std::iota(all.begin(), all.end(), 0);
      for (int i = 0; i < l.chosen; ++i)
        std::swap(all[std::size_t(i)], all[std::size_t(i + random.below(l.experts - i))]);
      if (favourite >= 0 &&
          std::find(all.begin(), all.begin() + l.chosen, favourite) == all.begin() + l.chosen) {
        all[0] = favourite;
      }
      ids.insert(ids.end(), all.begin(), all.begin() + l.chosen);
    }
    return ids;
  }

  std::vector<std::uint16_t> run(const sm90::ExpertFfn& a) {
    inout.upload(before);
    workspace.poison();
    check(sm90::expert_ffn(a, nullptr), "expert_ffn");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    return inout.host();
  }

  /// A sum, its terms' squares, and how far its terms may be off.
  struct Sum {
    double value = 0, squares = 0, slack = 0;

    void add(double term, double term_slack = 0) {
      value += term;
      squares += term * term;
      slack += term_slack;
    }
    /// How far a sum of `terms` of the same products in fp32 may be off: tensor cores cut off what lies below the last
    /// bit of the greatest of 16 products and what they are added to, always to the same side.
    double fp32_error(std::size_t terms) const {
      return (double(terms) / 16 + 8) * 0x1p-22 * std::sqrt(squares);
    }
  };

  /// All columns of one token, in fp64 but for the rounding of the activations; of e4m3 and int4 what they mean, or with
  /// `rounded` that in bfloat16.
  std::vector<Sum> expected(int token, bool rounded) const {
    const std::size_t hidden = std::size_t(layer.hidden), intermediate = std::size_t(layer.intermediate);
    std::vector<Sum> out(hidden);
    std::vector<double> act(intermediate), slack(intermediate), in(hidden);
    for (std::size_t i = 0; i < hidden; ++i) {
      in[i] = double(from_bf16(x[std::size_t(token) * args.x_stride + i]));
      out[i].add(double(from_bf16(before[std::size_t(token) * args.inout_stride + i])));
    }
    for (int c = 0; c < layer.chosen; ++c) {
      const std::size_t e = std::size_t(ids[std::size_t(token) * layer.chosen + c]);
      // Calls visit(i, weight) over row n of an expert's (rows, columns).
      const auto walk = [&](const std::vector<std::uint16_t>& bf16, const ScaledMatrices* scaled,
                            std::size_t rows, std::size_t n, std::size_t columns, auto&& visit) {
        const std::uint16_t* w = bf16.data() + (e * rows + n) * columns;
        const bool exact = scaled != nullptr && !rounded;
        for (std::size_t i = 0; i < columns; ++i)
          visit(i, exact ? scaled->at(e, n, i) : double(from_bf16(w[i])));
      };
      const auto product = [&](std::size_t n) {
        Sum sum;
        walk(gate_up, scaled_gate_up, 2 * intermediate, n, hidden,
             [&](std::size_t i, double weight) { sum.add(weight * in[i]); });
        return sum;
      };
      for (std::size_t i = 0; i < intermediate; ++i) {
        const Sum gate = product(i), up = product(intermediate + i);
        const double a = silu(gate.value) * up.value;
        const double error = 1.1 * std::abs(up.value) * gate.fp32_error(hidden) +
                             std::abs(silu(gate.value)) * up.fp32_error(hidden) + std::abs(a) * 0x1p-20;
        const auto round = [](double v) { return double(from_bf16(to_bf16(float(v)))); };
        act[i] = round(a);
        slack[i] = std::max(round(a + error) - act[i], act[i] - round(a - error));
      }
      const double w = double(weights[std::size_t(token) * layer.chosen + c]);
      for (std::size_t n = 0; n < hidden; ++n) {
        walk(down, scaled_down, hidden, n, intermediate, [&](std::size_t i, double weight) {
          out[n].add(w * weight * act[i], std::abs(w * weight) * slack[i]);
        });
      }
    }
    return out;
  }

  // How far a result may be off: activations that lie so close to the middle of two of bfloat16 that the error of the
  // sums before may have rounded them the other way, the error of the sums behind them, and half a unit of bfloat16 at the
  // end, at most 2^-8 of the result.
  double bound(const Sum& want) const {
    const std::size_t terms = std::size_t(layer.intermediate) * std::size_t(layer.chosen);
    const double sum = want.slack + want.fp32_error(terms) + 0x1p-22 * std::abs(want.value);
    return sum + (std::abs(want.value) + sum) / 256;
  }

  /// What is wrong with the first of these tokens' columns that is, or "".
  std::string difference(const std::vector<std::uint16_t>& got, const std::vector<int>& tokens,
                         bool rounded) const {
    for (const int t : tokens) {
      const std::vector<Sum> want = expected(t, rounded);
      for (int i = 0; i < layer.hidden; ++i) {
        const double v = double(from_bf16(got[std::size_t(t) * args.inout_stride + i]));
        const Sum& w = want[std::size_t(i)];
        if (std::abs(v - w.value) <= bound(w)) continue;
        return (testing::Message() << "token " << t << " column " << i << ": " << v << ", expected "
                                   << w.value << " within " << bound(w))
            .GetString();
      }
    }
    return "";
  }

  // Of weights with scales tiles multiply what is rounded to bfloat16 and the other kernels what the codes mean; a call takes one
  // or the other.
  void verify(const std::vector<std::uint16_t>& got, const std::vector<int>& tokens,
              const std::string& name) {
    std::string wrong = difference(got, tokens, false);
    if (!wrong.empty() && scaled_gate_up != nullptr) {
      const std::string also = difference(got, tokens, true);
      wrong = also.empty() ? "" : wrong + "; of rounded weights " + also;
    }
    ASSERT_EQ(wrong, "") << name;
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (std::int64_t(i) % args.inout_stride >= layer.hidden) {
        ASSERT_EQ(got[i], before[i]) << name << ": padding";
      } else {
        ASSERT_TRUE(std::isfinite(from_bf16(got[i]))) << name << ": element " << i;
      }
    }
  }

  Layer layer;
  const ScaledMatrices* scaled_gate_up = nullptr;  ///< what gate_up is rounded from, or null
  const ScaledMatrices* scaled_down = nullptr;     ///< the same of down
  std::vector<std::uint16_t> gate_up, down, x, before;
  std::vector<float> weights;
  OnDevice<std::uint16_t> gate_up_device, down_device, x_device, inout;
  OnDevice<float> weights_device;
  std::vector<std::int32_t> ids;
  OnDevice<std::int32_t> ids_device;
  OnDevice<std::byte> workspace;
  sm90::ExpertFfn args;
};

/// Weights in e4m3, on the device, of experts whose host copy holds what they mean in bfloat16.
struct E4m3Experts {
  E4m3Experts(Random& random, Experts& e, bool powers)
      : gate_up(random, e.gate_up, e.layer.experts, 2 * e.layer.intermediate, e.layer.hidden, powers),
        down(random, e.down, e.layer.experts, e.layer.hidden, e.layer.intermediate, powers) {
    e.args.gate_up = gate_up.codes.get();
    e.args.gate_up_scales = gate_up.scales.get();
    e.args.down = down.codes.get();
    e.args.down_scales = down.scales.get();
    e.scaled_gate_up = &gate_up;
    e.scaled_down = &down;
  }
  E4m3Experts(const E4m3Experts&) = delete;
  E4m3Matrices gate_up, down;
};

/// The same in int4.
struct Int4Experts {
  Int4Experts(Random& random, Experts& e)
      : gate_up(random, e.gate_up, e.layer.experts, 2 * e.layer.intermediate, e.layer.hidden),
        down(random, e.down, e.layer.experts, e.layer.hidden, e.layer.intermediate) {
    e.args.int4 = true;
    e.args.gate_up = gate_up.words.get();
    e.args.gate_up_scales = gate_up.scales.get();
    e.args.down = down.words.get();
    e.args.down_scales = down.scales.get();
    e.scaled_gate_up = &gate_up;
    e.scaled_down = &down;
  }
  Int4Experts(const Int4Experts&) = delete;
  Int4Matrices gate_up, down;
};

/// At most `most` of the tokens, the first and the last among them.
inline std::vector<int> some_tokens(Random& random, int tokens, int most) {
  std::vector<int> v;
  if (tokens <= most) {
    for (int t = 0; t < tokens; ++t) v.push_back(t);
    return v;
  }
  v = {0, tokens - 1};
  for (int i = 2; i < most; ++i) v.push_back(random.below(tokens));
  return v;
}

}  // namespace flash_mla::gpu_test
