// make_cuda_ops of a build without the CUDA engine.

#include "flash_mla/error.h"
#include "model/device/cuda/cuda_ops.h"

namespace flash_mla::model {

std::string why_no_cuda_ops() { return FLASH_MLA_NO_CUDA_ENGINE; }

std::unique_ptr<Ops> make_cuda_ops(const ModelConfig&, bool) {
  throw Unsupported("device cuda: " + why_no_cuda_ops());
}

}  // namespace flash_mla::model
