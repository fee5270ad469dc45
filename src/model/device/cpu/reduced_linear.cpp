#include "model/device/cpu/reduced_linear.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/rows/cpu/rows.h"

namespace flash_mla::model {
namespace {

void copy(const Matrix& from, const Matrix& to) {
  const std::size_t bytes = static_cast<std::size_t>(from.columns) * dtype_size(from.dtype);
  for (std::int64_t i = 0; i < from.rows; ++i) std::memcpy(to.row(i), from.row(i), bytes);
}

std::int64_t largest(const std::vector<Range>& parts) {
  return std::ranges::max_element(parts, {}, &Range::count)->count;
}

}  // namespace

std::vector<Range> shares(const Partition& partition, std::int64_t n) {
  std::vector<Range> out;
  out.reserve(static_cast<std::size_t>(partition.size));
  for (int rank = 0; rank < partition.size; ++rank) out.push_back(partition.share(n, rank));
  return out;
}

void gather_columns(CpuContext& context, const Matrix& whole, const std::vector<Range>& parts) {
  const Partition& partition = context.partition;
  const std::int64_t width = largest(parts);
  const Matrix mine = CpuContext::matrix(context.buffers.sent, whole.dtype, whole.rows, width);
  const Matrix all =
      CpuContext::matrix(context.buffers.received, whole.dtype, whole.rows * partition.size, width);
  const Range own = parts[static_cast<std::size_t>(partition.rank)];
  copy(whole.column_range(own.first, own.count), mine);
  context.ranks->all_gather(mine, all);
  for (int rank = 0; rank < partition.size; ++rank) {
    const Range part = parts[static_cast<std::size_t>(rank)];
    if (rank == partition.rank) continue;
    copy(all.row_range(rank * whole.rows, whole.rows).column_range(0, part.count),
         whole.column_range(part.first, part.count));
  }
}

void gather_rows(CpuContext& context, const Matrix& whole, const std::vector<Range>& parts) {
  const Partition& partition = context.partition;
  const std::int64_t most = largest(parts);
  const Matrix mine = CpuContext::matrix(context.buffers.sent, whole.dtype, most, whole.columns);
  const Matrix all =
      CpuContext::matrix(context.buffers.received, whole.dtype, most * partition.size, whole.columns);
  const Range own = parts[static_cast<std::size_t>(partition.rank)];
  copy(whole.row_range(own.first, own.count), mine);
  context.ranks->all_gather(mine, all);
  for (int rank = 0; rank < partition.size; ++rank) {
    const Range part = parts[static_cast<std::size_t>(rank)];
    if (rank != partition.rank) {
      copy(all.row_range(rank * most, part.count), whole.row_range(part.first, part.count));
    }
  }
}

CpuReducedLinear::CpuReducedLinear(const CpuContext& context, const Weight& weight, LayerKind kind,
                                   std::vector<Range> parts, std::vector<float> bias)
    : linear_(context, weight, kind, std::move(bias)),
      parts_(std::move(parts)),
      rows_(shares(context.partition, context.config.hidden_size)) {}

void CpuReducedLinear::multiply_add(CpuContext& context, const Matrix& x, const Matrix& inout) const {
  if (context.partition.alone()) return linear_.multiply_add(context, x, inout);
  if (!context.partition.exact) {
    const Matrix sum = CpuContext::matrix(context.buffers.sum, DType::kFloat32, inout.rows, inout.columns);
    linear_.multiply(context, x, sum);
    return reduce_into(context, sum, inout);
  }
  const auto rank = static_cast<std::size_t>(context.partition.rank);
  const Matrix all = context.activations(context.buffers.gathered, x.rows, parts_.back().end());
  copy(x, all.column_range(parts_[rank].first, x.columns));
  gather_columns(context, all, parts_);
  linear_.multiply_add(context, all, inout.column_range(rows_[rank].first, rows_[rank].count));
  gather_columns(context, inout, rows_);
}

void CpuReducedLinear::multiply(const CpuContext& context, const Matrix& x, const Matrix& sum) const {
  linear_.multiply(context, x, sum);
}

void reduce_into(CpuContext& context, const Matrix& sum, const Matrix& x) {
  context.ranks->all_reduce(sum);
  context.for_rows(x.rows, x.columns, [&](std::int64_t t) {
    auto* const total = reinterpret_cast<float*>(sum.row(t));
    thread_local std::vector<float> row;
    row.resize(static_cast<std::size_t>(x.columns));
    cpu::rows::widen(x.row(t), context.dtype, row.data(), x.columns);
    cpu::rows::add_scaled(total, 1.0f, row.data(), x.columns);
    cpu::rows::narrow(row.data(), x.row(t), context.dtype, x.columns);
  });
}

}  // namespace flash_mla::model
