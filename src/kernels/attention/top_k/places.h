#pragma once

// What becomes of a selected position: the offset of its row, and its slot where there is a page table.

#include <cstdint>

#include "flash_mla/top_k.h"

namespace flash_mla::selection {

/// Of the rows of a call whose `output` was checked, on the host.
class Places {
 public:
  Places(const TopKOutput& output, std::int64_t num_rows) : output_(output) {
    if (output.block_table.defined() && !output.row_request.defined()) {
      rows_per_request_ = num_rows / output.block_table.size(0);
    }
  }

  std::int64_t offset(std::int64_t row) const {
    return output_.offsets.defined() ? output_.offsets.ptr<const std::int32_t>()[row] : 0;
  }

  std::int64_t request(std::int64_t row) const {
    return output_.row_request.defined() ? output_.row_request.ptr<const std::int32_t>()[row]
                                         : row / rows_per_request_;
  }

  /// What is written for the positions of a row, in place.
  void translate(std::int64_t row, std::int32_t* positions, std::int64_t count) const {
    const std::int64_t first = offset(row);
    if (!output_.block_table.defined()) {
      if (first == 0) return;
      for (std::int64_t i = 0; i < count; ++i) {
        positions[i] = static_cast<std::int32_t>(positions[i] + first);
      }
      return;
    }
    const auto* table =
        output_.block_table.ptr<const std::int32_t>() + request(row) * output_.block_table.stride(0);
    const std::int64_t page_size = output_.page_size;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t position = positions[i] + first;
      positions[i] =
          static_cast<std::int32_t>(table[position / page_size] * page_size + position % page_size);
    }
  }

 private:
  const TopKOutput& output_;
  std::int64_t rows_per_request_ = 1;
};

}  // namespace flash_mla::selection
