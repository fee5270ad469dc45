#pragma once

#include <cstddef>
#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The largest k of top_k.
inline constexpr std::int64_t kMaxTopK = 4096;

/// Where the positions that are written come from: what is added to the place in a row, and a page table.
struct TopKOutput {
  /// Optional, (n) int32: added to every position of a row.
  TensorView offsets{};
  /// Optional, (b, max_blocks) int32, last dimension contiguous: positions become slots,
  /// block_table[r][position / page_size] * page_size + position % page_size, where r is the row's request.
  TensorView block_table{};
  /// With block_table, optional, (n) int32, 0 to b - 1: the request of each row. Without it n is a multiple of
  /// b and request r has the rows r * n / b to (r + 1) * n / b - 1.
  TensorView row_request{};
  std::int64_t page_size = 64;  ///< with block_table: tokens per page
};

/// The tensors of one call: n rows of scores, of each of which k positions are selected.
struct TopKArgs {
  TensorView logits;        ///< (n, width) float32, last dimension contiguous; rows any distance apart
  TensorView lengths;       ///< (n) int32: scores of each row that take part; 0 is legal
  TensorView row_starts{};  ///< optional, (n) int32: the column where each row begins; 0 where not given
  TopKOutput output{};
  TensorView indices;  ///< (n, k) int32, last dimension contiguous, k from 1 to kMaxTopK; written
};

struct TopKOptions {
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

/// Bytes of scratch memory top_k needs, on the tensors' device, 64-byte aligned; 0 on the CPU. Depends on
/// shapes alone. Throws as top_k does for shapes that do not fit together.
FLASH_MLA_API std::size_t top_k_workspace_size(const TopKArgs& args, const TopKOptions& options = {});

/// Selects the k largest scores of every row, exactly: the first k after a sort by value, larger first, and
/// among equal values by position, smaller first. Row i has the scores logits[i][row_starts[i] + j],
/// 0 <= j < lengths[i], and j is the position.
///   - Selected positions stand in ascending order in indices[i]; where a row has fewer than k scores all of
///     them are selected, and -1 fills the rest. Every entry is written.
///   - -0.0 equals +0.0. NaN, of either sign, is above +inf, and NaNs are equal: a NaN among the scores is
///     selected and not hidden. -inf is below every number and is selected where nothing else is left.
///   - Offsets are added and pages looked up after the selection, which they do not change.
/// There is no limit on the length of a row, on ties, or on how scores are distributed. A row's result depends
/// on its own scores alone: not on the run, the backend, the number of threads, the other rows or its place
/// among them. Scores outside a row are not read.
///
/// Allocates nothing and synchronises with nothing; a CUDA graph may capture it. On the host all arguments are
/// checked before anything is written: rows outside 0 to width, block tables too short or with entries that
/// are no page. Throws InvalidArgument (argument, value, what was expected) or Unsupported. On a GPU shapes,
/// dtypes, strides and devices are checked; rows that reach past the width are cut there, and the other values
/// are the caller's to get right.
FLASH_MLA_API void top_k(const TopKArgs& args, void* workspace, std::size_t workspace_bytes,
                         const TopKOptions& options = {});

namespace reference {

/// top_k by a sort of every row; one thread. For verification, not for speed.
FLASH_MLA_API void top_k(const TopKArgs& args);

}  // namespace reference
}  // namespace flash_mla
