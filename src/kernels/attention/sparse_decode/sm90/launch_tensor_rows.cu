// Sparse decode over 576-byte rows under one scale.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

template RowsLaunch rows_launch<raw_rows::TensorRows, true>(int);
template RowsLaunch rows_launch<raw_rows::TensorRows, false>(int);

}  // namespace flash_mla::sm90::sparse
