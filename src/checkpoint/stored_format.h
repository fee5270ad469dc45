#pragma once

namespace flash_mla::checkpoint {

/// How config.json's quantization_config says that matrices are stored, where they are.
struct StoredFormat {
  /// Of FP8 with a scale for every block, `NAME.weight_scale_inv` (blocks of rows, blocks of columns); 0: no FP8.
  int fp8_block_rows = 0, fp8_block_columns = 0;
  /// Columns of a scale of weights of 4 bits, as compressed-tensors packs them: in place of `NAME.weight` there are
  /// `NAME.weight_packed` (rows, ceil(columns / 8)) int32, `NAME.weight_scale` (rows, groups of columns) and
  /// `NAME.weight_shape` (2). -1: one scale for each row. 0: no such weights.
  int int4_group = 0;

  friend bool operator==(const StoredFormat&, const StoredFormat&) = default;
};

}  // namespace flash_mla::checkpoint
