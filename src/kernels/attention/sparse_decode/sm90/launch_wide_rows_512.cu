// Sparse decode over rows of 512 16-bit elements.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

template RowsLaunch rows_launch<raw_rows::WideRows<512>, true>(int);
template RowsLaunch rows_launch<raw_rows::WideRows<512>, false>(int);

}  // namespace flash_mla::sm90::sparse
