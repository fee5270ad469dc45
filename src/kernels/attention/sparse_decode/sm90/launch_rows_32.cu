// The sparse decode kernel over 656-byte rows for up to 32 heads.

#include "kernels/attention/sparse_decode/sm90/launch_rows.cuh"

namespace flash_mla::sm90::sparse {

FLASH_MLA_LAUNCH_ROWS(, 32);

}  // namespace flash_mla::sm90::sparse
