#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "backend.h"
#include "flash_mla/decode.h"

namespace flash_mla::conformance {

struct Shape {
  std::vector<std::int32_t> lengths;
  int s_q = 1, h_q = 4, h_kv = 1, page_size = 64, d_v = 512, rope = 64;
  DType dtype = DType::kBFloat16;
  bool causal = false;
  bool lse = true;
  std::optional<float> scale = std::nullopt;
  std::int64_t page_gap = 0;  ///< elements between pages beyond their dense size
  bool strided = false;       ///< q, out and lse in other layouts than the dense one
  bool rope_apart =
      false;  ///< q in two tensors, as vLLM has them: its heads outermost, and columns of a wider one
  unsigned seed = 1;
};

struct RunOptions {
  int num_parts = 3;
  int num_threads = 2;
  int fixed_split_blocks = 0;
};

struct Result {
  std::vector<float> out, lse;         ///< (b, s_q, h_q, d_v) and (b, h_q, s_q), dense
  std::vector<std::uint8_t> out_bits;  ///< `out` as it was stored
};

/// A random problem on the host: values clamp(N(0, 1) / 10, -1, 1), permuted pages, NaN in every slot that
/// belongs to no token, -1 and 2147480000 in every unused block-table entry.
class Problem {
 public:
  explicit Problem(Shape shape);

  const Shape& shape() const { return shape_; }

  /// Uploads, plans, decodes into outputs filled with NaN, and checks that nothing around outputs and
  /// workspace has changed.
  Result run(BackendUnderTest& backend, const RunOptions& how = {}) const;

  /// The fp64 reference.
  Result reference() const;

  /// An argument set over this problem's own (host) memory; `out` and `lse` over the given buffers.
  DenseDecodeArgs host_args(std::vector<std::uint8_t>& out, std::vector<float>& lse) const;

  /// The problem with its requests in another order, or only some of them.
  Problem selected(const std::vector<std::size_t>& requests) const;

  int d_qk() const { return shape_.d_v + shape_.rope; }
  std::int64_t batch() const { return static_cast<std::int64_t>(shape_.lengths.size()); }

  std::vector<std::uint8_t> q, cache;
  std::vector<std::int32_t> table;
  std::int64_t num_pages = 0, max_blocks = 0;

 private:
  /// Queries in two parts: (h_q, b, s_q, d_v), and (b, s_q, h_q, 3 rope) whose first two thirds are NaN.
  struct QueryParts {
    std::vector<std::uint8_t> latent, rope;
    TensorView latent_view, rope_view;
    std::size_t rope_offset;  ///< bytes from the start of `rope` to its first row
  };
  QueryParts query_parts(const TensorView& whole) const;

  struct Unfilled {};
  Problem(Shape shape, Unfilled) : shape_(std::move(shape)) {}
  TensorView view_of(void* data, DType dtype, std::vector<std::int64_t> shape, Device device,
                     bool permuted) const;

  Shape shape_;
};

/// Compares with the tolerances of the suite; NaN equals NaN only. The message names the first element that
/// is off. "" when close.
std::string difference(const Result& got, const Result& expected, DType dtype);

}  // namespace flash_mla::conformance
