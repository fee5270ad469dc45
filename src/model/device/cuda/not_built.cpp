// make_cuda_device of a build without the CUDA engine.

#include "flash_mla/error.h"
#include "model/device/cuda/cuda_device.h"

namespace flash_mla::model {

std::string why_no_cuda_device() { return FLASH_MLA_NO_CUDA_ENGINE; }

DeviceMemory cuda_memory() { throw Unsupported("device cuda: " + why_no_cuda_device()); }

std::unique_ptr<Device> make_cuda_device(const ModelConfig&, ModelQuantize, bool, bool) {
  throw Unsupported("device cuda: " + why_no_cuda_device());
}

}  // namespace flash_mla::model
