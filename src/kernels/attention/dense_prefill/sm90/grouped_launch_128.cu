#include "kernels/attention/dense_prefill/sm90/grouped_launch.cuh"

namespace flash_mla::sm90::prefill {

template void launch_grouped<128, 128>(const GroupedLaunch& call);

}  // namespace flash_mla::sm90::prefill
