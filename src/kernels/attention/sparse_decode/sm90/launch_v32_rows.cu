// Sparse decode over 656-byte rows.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

template RowsLaunch rows_launch<raw_rows::V32Rows, true>(int);
template RowsLaunch rows_launch<raw_rows::V32Rows, false>(int);

}  // namespace flash_mla::sm90::sparse
