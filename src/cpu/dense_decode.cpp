#include "cpu/dense_decode.h"

#include "flash_mla/reference.h"

namespace flash_mla::cpu {

std::size_t dense_decode_workspace_size(const DenseDecodeArgs&, const DecodeScheduleView&,
                                        const DenseDecodeParams&) {
  return 64;
}

void dense_decode(const DenseDecodeArgs& args, const DecodeScheduleView&, void*,
                  const DenseDecodeParams& params) {
  DenseDecodeOptions options;
  options.softmax_scale = params.softmax_scale;
  options.causal = params.causal;
  reference::dense_decode(args, options);
}

int default_num_threads() { return 2; }

}  // namespace flash_mla::cpu
