// The conformance suite's view of the sm90 backend.

#include <stdexcept>

#include "backend.h"
#include "device.h"

namespace flash_mla::conformance {
namespace {

class Sm90 : public BackendUnderTest {
 public:
  std::string name() const override { return "sm90"; }
  Device device() const override { return {DeviceType::kCuda, 0}; }
  bool supports(DType dtype, int d_qk, int d_v, int page_size) const override {
    return dtype != DType::kFloat32 && d_qk == 576 && d_v == 512 &&
           (page_size == 16 || page_size == 32 || page_size % 64 == 0);
  }
  bool supports(Operation operation, KvFormat format, DType) const override {
    if (operation == Operation::kDenseFp8Decode) return format != KvFormat::kFp8V4;
    return true;
  }
  bool supports_top_k() const override { return true; }
  bool supports_index_logits() const override { return true; }
  bool supports_index_quantisers() const override { return true; }
  double index_tolerance() const override { return 1e-3; }
  bool checks_values() const override { return false; }
  bool batch_invariant() const override { return true; }
  void* allocate(std::size_t bytes) override {
    void* p = nullptr;
    check(cudaMalloc(&p, bytes), "cudaMalloc");
    return p;
  }
  void release(void* memory) override { cudaFree(memory); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
};

}  // namespace

std::vector<std::shared_ptr<BackendUnderTest>> backends_under_test() { return {std::make_shared<Sm90>()}; }

}  // namespace flash_mla::conformance
