// Sparse decode over rows of 576 16-bit elements.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

template RowsLaunch rows_launch<raw_rows::WideRows<576>, true>(int);
template RowsLaunch rows_launch<raw_rows::WideRows<576>, false>(int);

}  // namespace flash_mla::sm90::sparse
