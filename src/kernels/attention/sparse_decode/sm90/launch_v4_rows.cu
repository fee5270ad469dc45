// Sparse decode over V4's rows.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

template RowsLaunch rows_launch<raw_rows::V4Rows, true>(int);
template RowsLaunch rows_launch<raw_rows::V4Rows, false>(int);

}  // namespace flash_mla::sm90::sparse
