#include "model/quantize/calibration.h"

#include <algorithm>
#include <cmath>

#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {

void InputStatistics::add(const InputStatistics& other) {
  if (sum_abs.empty()) {
    *this = other;
    return;
  }
  rows += other.rows;
  for (std::size_t k = 0; k < sum_abs.size(); ++k) {
    sum_abs[k] += other.sum_abs[k];
    sum_squares[k] += other.sum_squares[k];
    max_abs[k] = std::max(max_abs[k], other.max_abs[k]);
  }
}

void Calibration::observe(std::span<const std::string> tensors, const Matrix& rows) {
  if (rows.rows == 0 || tensors.empty()) return;
  const auto columns = static_cast<std::size_t>(rows.columns);
  InputStatistics one;
  one.rows = rows.rows;
  one.sum_abs.resize(columns);
  one.sum_squares.resize(columns);
  one.max_abs.resize(columns);
  std::vector<float> x(columns);
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    cpu::rows::widen(rows.row(i), rows.dtype, x.data(), rows.columns);
    for (std::size_t k = 0; k < columns; ++k) {
      const float size = std::abs(x[k]);
      one.sum_abs[k] += size;
      one.sum_squares[k] += size * size;
      one.max_abs[k] = std::max(one.max_abs[k], size);
    }
  }
  const std::lock_guard lock(mutex_);
  for (const std::string& tensor : tensors) first_[tensor] = tensors.front();
  inputs_[tensors.front()].add(one);
}

const InputStatistics* Calibration::find(const std::string& tensor) const {
  const auto first = first_.find(tensor);
  return first == first_.end() ? nullptr : &inputs_.at(first->second);
}

}  // namespace flash_mla::model
