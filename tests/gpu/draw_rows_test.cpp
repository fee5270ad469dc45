// Tokens drawn on the GPU against those that the CPU draws from the same logits.

#include "kernels/sampling/sm90/draw_rows.h"

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
  explicit OnDevice(const std::vector<T>& values) : DeviceMemory(values.size() * sizeof(T)) {
    upload(values.data(), bytes());
  }
};

constexpr float kInf = std::numeric_limits<float>::infinity();

// Rows of every kind: peaked and flat, with ties, with excluded tokens, all the same.
std::vector<float> make_row(int columns, int kind, std::mt19937& random) {
  std::normal_distribution<float> normal(0, kind % 5 == 0 ? 0.05f : kind % 5 == 1 ? 1.0f : 4.0f);
  std::vector<float> row(static_cast<std::size_t>(columns));
  for (float& x : row) {
    x = normal(random);
    if (kind % 4 == 1) x = std::round(2 * x) / 2;  // many equals
    if (kind % 4 == 2 && random() % 3 != 0) x = -kInf;
  }
  if (kind % 11 == 3) std::ranges::fill(row, 1.5f);
  row[random() % row.size()] = 6;
  return row;
}

Draw random_draw(std::mt19937& random) {
  const auto chance = [&] { return std::uniform_real_distribution<double>(0, 1)(random); };
  const double temperature[] = {1, 0.7, 2, 0.05, 10, 1e-12};
  const int k[] = {0, 0, 1, 40, 1000, 2048, 2049, 50000};
  const double p[] = {1, 1, 0.9, 0.99, 0.5, 1e-6, 0.99999};
  const double min_p[] = {0, 0, 0.05, 0.9};
  return cpu::make_draw(chance(), temperature[random() % 6], k[random() % 8], p[random() % 7],
                        min_p[random() % 4]);
}

TEST(DrawRows, AreTheTokensThatTheCpuDraws) {
  std::mt19937 random(4);
  // Few rows take several blocks each, many rows one.
  for (const auto& [columns, rows] : std::vector<std::pair<int, int>>{{1, 9},
                                                                      {7, 60},
                                                                      {160, 150},
                                                                      {4096, 60},
                                                                      {32003, 15},
                                                                      {32003, 30},
                                                                      {102400, 16},
                                                                      {102400, 140},
                                                                      {129280, 60}}) {
    SCOPED_TRACE(std::to_string(columns) + " columns, " + std::to_string(rows) + " rows");
    const auto count = static_cast<std::size_t>(rows);
    std::vector<float> logits;
    std::vector<Draw> draws(count);
    std::vector<std::int32_t> likeliest(count), expected(count);
    cpu::DrawScratch scratch;
    for (int i = 0; i < rows; ++i) {
      const std::vector<float> row = make_row(columns, i, random);
      logits.insert(logits.end(), row.begin(), row.end());
      const auto best = std::ranges::max_element(row);
      const auto at = static_cast<std::size_t>(i);
      likeliest[at] = expected[at] = static_cast<std::int32_t>(best - row.begin());
      draws[at] = random_draw(random);
      if (i % 10 == 7) draws[at] = Draw();  // stays the likeliest
      if (i % 20 == 13) likeliest[at] = expected[at] = -1;
      if (draws[at].scale > 0 && likeliest[at] >= 0)
        expected[at] = cpu::draw_token(row, *best, draws[at], scratch);
    }
    const OnDevice device_logits(logits);
    const OnDevice device_draws(draws);
    const OnDevice tokens(likeliest);
    const Matrix matrix{device_logits.as<std::byte>(), DType::kFloat32, rows, columns, columns};
    draw_rows(matrix, device_draws.as<Draw>(), tokens.as<std::int32_t>(), nullptr);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const std::vector<std::int32_t> drawn = tokens.download<std::int32_t>();
    for (std::size_t i = 0; i < draws.size(); ++i) {
      EXPECT_EQ(drawn[i], expected[i])
          << "row " << i << ": u " << draws[i].u << ", scale " << draws[i].scale << ", top_k "
          << draws[i].top_k << ", top_p " << draws[i].top_p << ", min_weight " << draws[i].min_weight;
    }
  }
}

TEST(DrawRows, TakeLittleTime) {
  constexpr int kColumns = 102400;
  std::mt19937 random(5);
  struct Kind {
    const char* name;
    Draw draw;
    int row;
  };
  for (const Kind& kind : {Kind{"temperature", cpu::make_draw(0.5, 1, 0, 1, 0), 2},
                           Kind{"top_k 50", cpu::make_draw(0.5, 1, 50, 1, 0), 2},
                           Kind{"top_k 50, top_p", cpu::make_draw(0.5, 0.7, 50, 0.9, 0), 2},
                           Kind{"top_p of a peaked row", cpu::make_draw(0.5, 1, 0, 0.9, 0), 2},
                           Kind{"top_p of a flat row", cpu::make_draw(0.5, 1, 0, 0.9, 0), 0}}) {
    for (const int rows : {1, 32, 128}) {
      std::vector<float> logits;
      const std::vector<float> row = make_row(kColumns, kind.row, random);
      for (int i = 0; i < rows; ++i) logits.insert(logits.end(), row.begin(), row.end());
      const auto best = static_cast<std::int32_t>(std::ranges::max_element(row) - row.begin());
      const auto count = static_cast<std::size_t>(rows);
      const OnDevice device_logits(logits);
      const OnDevice draws(std::vector(count, kind.draw));
      const Matrix matrix{device_logits.as<std::byte>(), DType::kFloat32, rows, kColumns, kColumns};
      std::vector<float> times;
      cudaEvent_t begin, end;
      cudaEventCreate(&begin);
      cudaEventCreate(&end);
      for (int i = 0; i < 9; ++i) {
        const OnDevice tokens(std::vector(count, best));
        cudaEventRecord(begin);
        draw_rows(matrix, draws.as<Draw>(), tokens.as<std::int32_t>(), nullptr);
        cudaEventRecord(end);
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        cudaEventElapsedTime(&times.emplace_back(), begin, end);
      }
      cudaEventDestroy(begin);
      cudaEventDestroy(end);
      std::ranges::sort(times);
      std::printf("%-24s %3d rows: %.1f us\n", kind.name, rows, static_cast<double>(times[4]) * 1e3);
      EXPECT_LT(times[4], 2) << "ms";
    }
  }
}

}  // namespace
}  // namespace flash_mla::sm90
