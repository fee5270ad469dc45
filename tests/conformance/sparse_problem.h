#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.h"
#include "flash_mla/sparse.h"

namespace flash_mla::conformance {

/// A cache of a test, and the lists over it.
struct PoolShape {
  KvFormat format = KvFormat::kFp8V32;
  int tokens = 512, page_size = 64;
  int topk = 64;
  bool lengths = false;  ///< topk_length: random, 0 and topk among them; garbage past it
  Fp8Recipe recipe = Fp8Recipe::kFlashMla;
  int page_gap = 0;          ///< bytes between pages beyond their dense size, a multiple of 16
  float scale = 1.0f / 256;  ///< of kFp8Tensor
};

enum class Lists {
  kRandom,      ///< with -1 anywhere, unsorted
  kInvalid,     ///< nothing but -1
  kDuplicates,  ///< few tokens, many times
  kClustered,   ///< runs of neighbours
};

struct SparseShape {
  int b = 2, s_q = 1, h_q = 16, d_qk = 576;
  PoolShape keys{};
  bool has_extra = false;
  PoolShape extra{};
  bool sink = false;
  bool lse = true;
  Lists lists = Lists::kRandom;
  DType dtype = DType::kBFloat16;
  bool strided = false;  ///< q, out and lse in other layouts than the dense one
  unsigned seed = 1;
};

struct SparseResult {
  std::vector<float> out, lse, max_logits;  ///< dense
  std::vector<std::uint8_t> bits;           ///< of everything that was written
};

/// Pages in host memory. A token that no list may select is NaN in every byte that could be one.
class TestPool {
 public:
  TestPool() = default;
  TestPool(const PoolShape& shape, int d_qk, DType rows_dtype, unsigned seed);

  /// A view on a copy of `bytes` at `data`.
  KvCacheView view(void* data, Device device) const;
  KvCacheView host_view() const { return view(const_cast<std::uint8_t*>(bytes.data()), {}); }

  std::vector<std::uint8_t> bytes;
  std::vector<std::int32_t> live;  ///< slots that hold tokens
  std::int64_t num_pages = 0;

 private:
  PoolShape shape_;
  int d_qk_ = 0;
  DType rows_dtype_ = DType::kBFloat16;
};

/// A random sparse decode on the host.
class SparseProblem {
 public:
  explicit SparseProblem(SparseShape shape);

  const SparseShape& shape() const { return shape_; }

  /// Uploads, decodes into outputs filled with NaN, and checks that inputs and everything around outputs and
  /// workspace are as they were.
  SparseResult run(BackendUnderTest& backend, const SparseDecodeOptions& options = {}) const;

  /// What is off, "" when nothing: `rows` query tokens and at most `heads` heads of each against the float64
  /// reference, by the tolerances of sparse decode.
  std::string difference(const SparseResult& got, int rows = 4, int heads = 5,
                         const SparseDecodeOptions& options = {}) const;

  /// Arguments over this problem's own memory, without outputs.
  SparseDecodeArgs host_args() const;

  /// The problem with some of its requests, in that order.
  SparseProblem selected(const std::vector<std::size_t>& requests) const;

  /// The dense shape of out: (b, s_q, h_q, 512).
  std::size_t out_row(std::int64_t r, std::int64_t i, std::int64_t h) const {
    return static_cast<std::size_t>(((r * shape_.s_q + i) * shape_.h_q + h) * 512);
  }
  std::size_t lse_at(std::int64_t r, std::int64_t i, std::int64_t h) const {
    return static_cast<std::size_t>((r * shape_.h_q + h) * shape_.s_q + i);
  }

  std::vector<std::uint8_t> q;
  std::vector<float> sink;
  TestPool pool, extra_pool;
  std::vector<std::int32_t> indices, extra_indices;  ///< (b, s_q, topk)
  std::vector<std::int32_t> lengths, extra_lengths;  ///< (b), or empty

 private:
  void make_lists(const PoolShape& shape, const TestPool& pool, unsigned seed,
                  std::vector<std::int32_t>& lists, std::vector<std::int32_t>& counts) const;

  SparseShape shape_;
};

/// The tolerances of section "Numbers" of the suite: an element passes by the absolute or the relative bound.
/// NaN and infinity match exactly. "" when close.
std::string compare(const char* name, const std::vector<float>& got, const std::vector<float>& expected,
                    double absolute, double relative, double cosine);

}  // namespace flash_mla::conformance
