// The sparse decode kernel over 656-byte rows for up to 64 heads.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

FLASH_MLA_LAUNCH_ROWS(, 64);

}  // namespace flash_mla::sm90::sparse
