#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "base/matrix.h"

namespace flash_mla::model {

/// Of the input of a product, for each input feature.
struct InputStatistics {
  std::int64_t rows = 0;
  std::vector<float> sum_abs, sum_squares, max_abs;

  void add(const InputStatistics& other);
  /// Mean square of feature k.
  float mean_square(std::size_t k) const { return sum_squares[k] / static_cast<float>(rows); }
};

/// Collects them while a model runs: ModelOptions::on_product.
class Calibration {
 public:
  /// Rows that a product takes with the weights in these tensors. From any thread.
  void observe(std::span<const std::string> tensors, const Matrix& rows);
  /// Of a tensor's product, or null if it had no rows.
  const InputStatistics* find(const std::string& tensor) const;
  bool empty() const { return inputs_.empty(); }

 private:
  std::mutex mutex_;
  std::map<std::string, InputStatistics> inputs_;  // by the first tensor of a product
  std::map<std::string, std::string> first_;       // of every tensor
};

}  // namespace flash_mla::model
