// The sparse prefill kernel over rows of 16-bit elements as they lie in the cache.

#include "kernels/attention/sparse_prefill/sm90/launch.cuh"

namespace flash_mla::sm90::sparse_prefill {

template Launch of_raw_rows<raw_rows::WideRows<576>, true>(int);
template Launch of_raw_rows<raw_rows::WideRows<576>, false>(int);

}  // namespace flash_mla::sm90::sparse_prefill
