// make_cuda_device of a build without the CUDA engine.

#include "flash_mla/error.h"
#include "model/device/cuda/cuda_device.h"

namespace flash_mla::model {

std::string why_no_cuda_device(int) { return FLASH_MLA_NO_CUDA_ENGINE; }

int num_cuda_devices() { return 0; }

DeviceMemory cuda_memory(int) { throw Unsupported("device cuda: " + why_no_cuda_device()); }

std::unique_ptr<Device> make_cuda_device(const ModelConfig&, ModelQuantize, bool, bool, const CudaSeat&) {
  throw Unsupported("device cuda: " + why_no_cuda_device());
}

}  // namespace flash_mla::model
