#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/matrix.h"
#include "model/device/cpu/context.h"
#include "model/device/cpu/linear.h"
#include "model/weights.h"

namespace flash_mla::model {

/// `whole` has this rank's columns, parts[rank]; afterwards it has those of all ranks.
void gather_columns(CpuContext& context, const Matrix& whole, const std::vector<Range>& parts);
/// The same of rows.
void gather_rows(CpuContext& context, const Matrix& whole, const std::vector<Range>& parts);
/// Every rank's share of n things.
std::vector<Range> shares(const Partition& partition, std::int64_t n);

/// x·W^T + bias over features of which every rank has some, with its part of W: columns, or of an exact partition rows
/// (docs/ranks.md).
class CpuReducedLinear {
 public:
  /// `parts`: of each rank, its columns of x.
  CpuReducedLinear(const CpuContext& context, const Weight& weight, LayerKind kind, std::vector<Range> parts,
                   std::vector<float> bias = {});

  /// inout += x·W^T + bias, on all ranks; x has this rank's columns.
  void multiply_add(CpuContext& context, const Matrix& x, const Matrix& inout) const;
  /// sum (float32) = what this rank adds to it. Not of an exact partition.
  void multiply(const CpuContext& context, const Matrix& x, const Matrix& sum) const;

 private:
  CpuLinear linear_;
  std::vector<Range> parts_, rows_;
};

/// sum over ranks, then x += sum.
void reduce_into(CpuContext& context, const Matrix& sum, const Matrix& x);

}  // namespace flash_mla::model
