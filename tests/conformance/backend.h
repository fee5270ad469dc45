#pragma once

#include <cstddef>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "flash_mla/decode.h"
#include "flash_mla/kv_cache.h"

namespace flash_mla::conformance {

/// What a backend may or may not have, of sparse attention and FP8 caches.
enum class Operation { kSparseDecode, kSparsePrefill, kDenseFp8Decode, kAppend, kGather };

/// What the suite asks of a backend: memory it can use, moved to and from the host, and nothing else. A
/// backend joins the suite by an entry in backends_under_test().
class BackendUnderTest {
 public:
  virtual ~BackendUnderTest() = default;
  virtual std::string name() const = 0;
  virtual Device device() const = 0;
  virtual bool supports(DType dtype, int d_qk, int d_v, int page_size) const = 0;
  virtual bool supports(Operation, KvFormat, DType /*of q, or of the rows appended or gathered*/) const {
    return false;
  }
  virtual bool supports_top_k() const { return false; }
  virtual bool supports_index_logits() const { return false; }
  virtual bool supports_index_quantisers() const { return false; }
  /// Of the largest logit. FP8 products of Hopper keep about 14 bits.
  virtual double index_tolerance() const { return 2e-5; }
  virtual bool checks_values() const = 0;  ///< lengths and block table are read on the host before the call
  virtual bool batch_invariant() const = 0;
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;
};

std::vector<std::shared_ptr<BackendUnderTest>> backends_under_test();

inline void PrintTo(const std::shared_ptr<BackendUnderTest>& b, std::ostream* out) { *out << b->name(); }

}  // namespace flash_mla::conformance
