#include "backend.h"

#include <cstdlib>
#include <cstring>

namespace flash_mla::conformance {
namespace {

class Cpu : public BackendUnderTest {
 public:
  std::string name() const override { return "cpu"; }
  Device device() const override { return {}; }
  bool supports(DType, int, int, int) const override { return true; }
  bool supports(Operation, KvFormat, DType) const override { return true; }
  bool supports_top_k() const override { return true; }
  bool supports_index_logits() const override { return true; }
  bool supports_index_quantisers() const override { return true; }
  bool checks_values() const override { return true; }
  bool batch_invariant() const override { return true; }
  void* allocate(std::size_t bytes) override { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }
  void release(void* memory) override { std::free(memory); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
};

}  // namespace

std::vector<std::shared_ptr<BackendUnderTest>> backends_under_test() { return {std::make_shared<Cpu>()}; }

}  // namespace flash_mla::conformance
