#include "flash_mla/top_k.h"

#include <algorithm>
#include <limits>

#include "api/call.h"
#include "api/top_k_checks.h"
#include "kernels/attention/dense_decode/cpu/dense_decode.h"
#include "kernels/attention/top_k/cpu/top_k.h"
#include "kernels/attention/top_k/places.h"
#include "kernels/attention/top_k/reference/top_k.h"
#include "kernels/attention/top_k/sm90/top_k.h"

namespace flash_mla {
namespace api {
namespace {

std::int64_t int_at(const TensorView& t, std::int64_t i) { return t.ptr<const std::int32_t>()[i]; }

/// An optional (n) int32 tensor.
void check_row_numbers(const TensorView& t, const char* name, std::int64_t n, const TensorView& indices) {
  if (!t.defined()) return;
  check_tensor(t, name, 1, {DType::kInt32});
  check_size(t, name, 0, n, "rows (n)");
  check_last_dim_contiguous(t, name);
  check_same_device(t, name, indices, "indices");
}

}  // namespace

void check_top_k_output_shapes(const TopKOutput& output, const TensorView& indices, std::int64_t n) {
  check_tensor(indices, "indices", 2, {DType::kInt32});
  check_size(indices, "indices", 0, n, "rows (n)");
  if (indices.size(1) < 1 || indices.size(1) > kMaxTopK) {
    invalid("indices.shape[1] (k) is {}, expected 1 to {}", indices.size(1), kMaxTopK);
  }
  check_last_dim_contiguous(indices, "indices");
  check_no_overlap(indices, "indices");
  check_row_numbers(output.offsets, "offsets", n, indices);
  check_row_numbers(output.row_request, "row_request", n, indices);
  if (!output.block_table.defined()) {
    if (output.row_request.defined()) invalid("row_request is given without block_table, expected both");
    return;
  }
  const TensorView& table = output.block_table;
  check_tensor(table, "block_table", 2, {DType::kInt32});
  check_last_dim_contiguous(table, "block_table");
  check_same_device(table, "block_table", indices, "indices");
  const std::int64_t b = table.size(0);
  if (n > 0 && b < 1) invalid("block_table.shape[0] (b) is {}, expected >= 1", b);
  if (!output.row_request.defined() && n > 0 && n % b != 0) {
    invalid("block_table.shape[0] (b) is {}, expected a divisor of the {} rows, or row_request", b, n);
  }
  if (output.page_size < 1 || output.page_size > std::numeric_limits<std::int32_t>::max()) {
    invalid("page_size is {}, expected 1 to 2147483647", output.page_size);
  }
}

void check_top_k_output_values(const TopKOutput& output, std::int64_t row, std::int64_t length,
                               std::int64_t num_rows) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const selection::Places places(output, num_rows);
  const std::int64_t offset = places.offset(row);
  const TensorView& table = output.block_table;
  std::int64_t request = 0;
  if (table.defined()) {
    request = places.request(row);
    if (request < 0 || request >= table.size(0)) {
      invalid("row_request[{}] is {}, expected 0 to block_table.shape[0] - 1 = {}", row, request,
              table.size(0) - 1);
    }
  }
  if (length == 0) return;
  if (offset < 0 || offset + length - 1 > kMax) {
    invalid("offsets[{}] is {}, expected 0 to {} (the row has {} positions)", row, offset, kMax - length + 1,
            length);
  }
  if (!table.defined()) return;
  const std::int64_t page_size = output.page_size, last = (offset + length - 1) / page_size;
  if (last >= table.size(1)) {
    invalid("block_table.shape[1] is {}, expected at least {} (row {} has positions up to {})", table.size(1),
            last + 1, row, offset + length - 1);
  }
  const auto* pages = table.ptr<const std::int32_t>() + request * table.stride(0);
  for (std::int64_t block = offset / page_size; block <= last; ++block) {
    if (pages[block] < 0 || (pages[block] + std::int64_t{1}) * page_size - 1 > kMax) {
      invalid(
          "block_table[{}][{}] is {}, expected a page whose slots are numbers of 32 bits (row {} uses it)",
          request, block, pages[block], row);
    }
  }
}

namespace {

void check_shapes(const TopKArgs& a, const TopKOptions& options) {
  check_tensor(a.logits, "logits", 2, {DType::kFloat32});
  check_last_dim_contiguous(a.logits, "logits");
  const std::int64_t n = a.logits.size(0);
  if (a.logits.size(1) > std::numeric_limits<std::int32_t>::max()) {
    invalid("logits.shape[1] (width) is {}, expected at most 2147483647", a.logits.size(1));
  }
  check_tensor(a.lengths, "lengths", 1, {DType::kInt32});
  check_top_k_output_shapes(a.output, a.indices, n);
  check_row_numbers(a.lengths, "lengths", n, a.indices);
  check_row_numbers(a.row_starts, "row_starts", n, a.indices);
  check_same_device(a.logits, "logits", a.indices, "indices");
  if (options.num_threads < 0) invalid("num_threads is {}, expected >= 0", options.num_threads);
}

void check_values(const TopKArgs& a) {
  const std::int64_t n = a.logits.size(0), width = a.logits.size(1);
  for (std::int64_t row = 0; row < n; ++row) {
    const std::int64_t start = a.row_starts.defined() ? int_at(a.row_starts, row) : 0;
    if (start < 0 || start > width) {
      invalid("row_starts[{}] is {}, expected 0 to logits.shape[1] (width) = {}", row, start, width);
    }
    const std::int64_t length = int_at(a.lengths, row);
    if (length < 0 || start + length > width) {
      invalid("lengths[{}] is {}, expected 0 to {} (the row begins at {} of logits.shape[1] = {})", row,
              length, width - start, start, width);
    }
    check_top_k_output_values(a.output, row, length, n);
  }
}

}  // namespace
}  // namespace api

std::size_t top_k_workspace_size(const TopKArgs& args, const TopKOptions& options) {
  api::check_shapes(args, options);
  // A backend of no build says so here already.
  api::backend_of(options.backend, args.indices, "indices");
  return 0;
}

void top_k(const TopKArgs& args, void* workspace, std::size_t workspace_bytes, const TopKOptions& options) {
  api::check_workspace_bytes(workspace, workspace_bytes, top_k_workspace_size(args, options),
                             "top_k_workspace_size");
  if (api::backend_of(options.backend, args.indices, "indices") == Backend::kSm90) {
    const std::int64_t n = args.logits.size(0);
    const TensorView& table = args.output.block_table;
    sm90::top_k(args, 0, table.defined() && n > 0 ? n / table.size(0) : 1, options.stream);
    return;
  }
  api::check_values(args);
  cpu::top_k(args, options.num_threads > 0 ? options.num_threads : cpu::default_num_threads());
}

namespace reference {

void top_k(const TopKArgs& args) {
  api::check_shapes(args, {});
  if (args.indices.device.type != DeviceType::kCpu) {
    api::invalid("indices is {}, expected a CPU tensor", args.indices.describe());
  }
  api::check_values(args);
  top_k_unchecked(args);
}

}  // namespace reference
}  // namespace flash_mla
