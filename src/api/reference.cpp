#include "flash_mla/reference.h"

#include <cmath>

#include "api/checks.h"
#include "kernels/attention/dense_decode/reference/dense_decode.h"

namespace flash_mla::reference {

void dense_decode(const DenseDecodeArgs& args, const DenseDecodeOptions& options) {
  api::check_dense_decode_shapes(args, options, /*allow_reference_types=*/true);
  if (args.q.device.type != DeviceType::kCpu) {
    api::invalid("q is {}, expected a CPU tensor", args.q.describe());
  }
  api::check_dense_decode_values(args);
  const double scale = options.softmax_scale ? double{*options.softmax_scale}
                                             : 1.0 / std::sqrt(static_cast<double>(args.q.size(3)));
  dense_decode(args, scale, options.causal && args.q.size(1) > 1);
}

}  // namespace flash_mla::reference
