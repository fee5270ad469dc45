// Rows of logits that rules change on the GPU against what the CPU makes of them.

#include "kernels/sampling/sm90/token_rules.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "kernels/sampling/cpu/draw.h"

namespace flash_mla::sm90 {
namespace {

template <class T>
class OnDevice : public gpu_test::DeviceMemory {
 public:
  explicit OnDevice(const std::vector<T>& values)
      : DeviceMemory(std::max<std::size_t>(values.size(), 1) * sizeof(T)) {
    upload(values.data(), values.size() * sizeof(T));
  }
};

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rules of `rows` rows, as the host has them and as the device takes them.
struct Case {
  Case(int rows, int columns, std::mt19937& random) : words((static_cast<std::size_t>(columns) + 31) / 32) {
    std::vector<std::pair<int, std::size_t>> bias_spans;
    for (int i = 0; i < rows; ++i) {
      if (i % 5 == 4) continue;  // has no rule
      RuledRow row;
      row.row = i;
      if (i % 3 != 1) {
        row.mask = static_cast<std::int32_t>(masks.size() / words);
        for (std::size_t w = 0; w < words; ++w) {
          const auto bits = static_cast<std::uint32_t>(random());
          // Many, few, one or none of the tokens.
          masks.push_back(i % 4 == 0       ? bits
                          : i % 4 == 1     ? bits & bits >> 7 & bits >> 13
                          : w == words / 2 ? 2
                                           : 0);
        }
        if (i % 4 == 2) std::fill(masks.end() - static_cast<std::ptrdiff_t>(words), masks.end(), ~0u);
      }
      row.first_bias = static_cast<std::int32_t>(biases.size());
      for (int k = 0; k < (i % 3 == 0 ? 0 : i % 7 == 0 ? 300 : 3); ++k) {
        const auto token = static_cast<std::int32_t>(random() % static_cast<unsigned>(columns + 3));
        biases.push_back({token, static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 10});
        if (k % 2 == 0) biases.push_back({token, 0.3F});  // the order of sums counts
      }
      std::stable_sort(biases.begin() + row.first_bias, biases.end(),
                       [](const TokenBias& a, const TokenBias& b) { return a.token < b.token; });
      row.num_biases = static_cast<std::int32_t>(biases.size()) - row.first_bias;
      ruled.push_back(row);
    }
  }

  TokenRule rule(const RuledRow& row) const {
    return {row.mask < 0 ? nullptr : masks.data() + static_cast<std::size_t>(row.mask) * words,
            std::span(biases).subspan(static_cast<std::size_t>(row.first_bias),
                                      static_cast<std::size_t>(row.num_biases))};
  }

  std::size_t words;
  std::vector<RuledRow> ruled;
  std::vector<std::uint32_t> masks;
  std::vector<TokenBias> biases;
};

void apply(const Case& c, const Matrix& logits) {
  const OnDevice rows(c.ruled);
  const OnDevice masks(c.masks);
  const OnDevice biases(c.biases);
  apply_token_rules(
      logits, {rows.as<RuledRow>(), std::ssize(c.ruled), masks.as<std::uint32_t>(), biases.as<TokenBias>()},
      nullptr);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST(TokenRules, ChangeRowsAsTheCpuDoes) {
  std::mt19937 random(6);
  for (const auto& [columns, rows] : std::vector<std::pair<int, int>>{
           {1, 9}, {7, 60}, {32, 5}, {160, 150}, {4096, 60}, {32003, 30}, {102400, 16}, {129280, 140}}) {
    SCOPED_TRACE(std::to_string(columns) + " columns, " + std::to_string(rows) + " rows");
    const Case c(rows, columns, random);
    std::normal_distribution<float> normal(0, 4);
    const auto width = static_cast<std::size_t>(columns);
    std::vector<float> logits(static_cast<std::size_t>(rows) * width);
    for (float& x : logits) x = random() % 1000 == 0 ? -kInf : normal(random);
    for (std::size_t i = 0; i < logits.size(); i += 3 * width + 1)
      logits[i] = i % 2 == 0 ? std::nanf("") : kInf;
    std::vector<float> expected = logits;
    for (const RuledRow& row : c.ruled) {
      const std::size_t begin = static_cast<std::size_t>(row.row) * width;
      cpu::apply_rule(std::span(expected).subspan(begin, width), c.rule(row));
      for (std::size_t i = begin; i < begin + width; ++i) {
        if (!(logits[i] < kInf)) expected[i] = logits[i];
      }
    }
    const OnDevice device_logits(logits);
    apply(c, {device_logits.as<std::byte>(), DType::kFloat32, rows, columns, columns});
    const std::vector<float> changed = device_logits.download<float>();
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const bool same = std::isnan(expected[i]) ? std::isnan(changed[i]) : changed[i] == expected[i];
      if (!same && wrong++ == 0) {
        ADD_FAILURE() << "row " << i / width << ", token " << i % width << ": " << changed[i] << ", expected "
                      << expected[i];
      }
    }
    EXPECT_EQ(wrong, 0u);
  }
}

TEST(TokenRules, TakeLittleTime) {
  constexpr int kColumns = 129280;
  std::mt19937 random(7);
  for (const int rows : {1, 32, 128}) {
    Case c(0, kColumns, random);
    for (int i = 0; i < rows; ++i) {
      c.ruled.push_back({i, i, 0, 0});
      c.masks.insert(c.masks.end(), c.words, 0);  // all excluded: the most to write
    }
    const OnDevice device_rows(c.ruled);
    const OnDevice masks(c.masks);
    const OnDevice logits(std::vector<float>(static_cast<std::size_t>(rows) * kColumns, 1.0F));
    const Matrix matrix{logits.as<std::byte>(), DType::kFloat32, rows, kColumns, kColumns};
    std::vector<float> times;
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    for (int i = 0; i < 9; ++i) {
      cudaEventRecord(begin);
      apply_token_rules(matrix, {device_rows.as<RuledRow>(), rows, masks.as<std::uint32_t>(), nullptr},
                        nullptr);
      cudaEventRecord(end);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      cudaEventElapsedTime(&times.emplace_back(), begin, end);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    std::ranges::sort(times);
    std::printf("masks of %3d rows: %.1f us\n", rows, static_cast<double>(times[4]) * 1e3);
    EXPECT_LT(times[4], 1) << "ms";
  }
}

}  // namespace
}  // namespace flash_mla::sm90
