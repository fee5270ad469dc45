#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// The work of one worker (a CPU thread, a GPU cluster): a contiguous run of KV blocks that starts in
/// the middle of one request and ends in the middle of another. Eight int32, so that an array of parts
/// is the `tile_scheduler_metadata` tensor of shape (num_parts, 8).
///
/// A worker walks requests begin_req..end_req (inclusive). In the first it starts at block begin_block,
/// in the last it stops before block end_block; every request between is its own alone. A part without
/// work has begin_req > end_req.
struct DecodePart {
  std::int32_t begin_req = 0;
  std::int32_t end_req = 0;         ///< inclusive
  std::int32_t begin_block = 0;     ///< first block of begin_req, inclusive
  std::int32_t end_block = 0;       ///< last block of end_req, exclusive
  std::int32_t begin_split = 0;     ///< index, within begin_req, of the first split this part produces
  std::int32_t first_is_split = 0;  ///< 1: begin_req has more than one split
  std::int32_t last_is_split = 0;   ///< 1: end_req has more than one split
  std::int32_t pad = 0;
};
static_assert(sizeof(DecodePart) == 32);

struct ScheduleOptions {
  /// Number of parts to plan for: one per worker.
  int num_parts = 1;
  /// Tokens per block, the unit in which requests are cut.
  int block_size = 64;
  /// What starting a request costs, in blocks: query load, epilogue, output store.
  int fixed_overhead_blocks = 5;
  /// Blocks that a request without keys counts as (its output still has to be written).
  int min_blocks_per_request = 1;
  /// 0: cut requests wherever the balance wants it. > 0: batch-invariant mode, every request is cut at
  /// multiples of this many blocks and nowhere else, so that its splits, and with them its bits, depend
  /// on its own length alone.
  int fixed_split_blocks = 0;
  /// Fewest blocks that a part is given, up to 65536, so that a small batch is not cut into pieces that are
  /// too short to be worth a part. No effect with fixed_split_blocks.
  int min_blocks_per_part = 1;
  /// > 0: every part is given as many whole requests, none is cut, if the longest of them would then keep no
  /// part busy for more than this many percent over the average of all parts. A cut costs partial results and
  /// their combination, which a little imbalance is worth. No effect with fixed_split_blocks.
  int whole_requests_percent = 0;
};

/// A member of ScheduleOptions, for code that handles all of them alike, as bindings and command lines do.
struct ScheduleOptionField {
  const char* name;
  int ScheduleOptions::*value;
  int least, most;  ///< inclusive
};

/// All members of ScheduleOptions. ScheduleOptions{} says what each is by default.
FLASH_MLA_API std::span<const ScheduleOptionField> schedule_option_fields();

/// What columns 1 and 3 of a schedule's rows count: blocks (DecodePart), or tokens, as FlashMLA's metadata
/// did until September 2025.
enum class PartUnit { kBlocks, kTokens };

/// A schedule as the decode kernels take it. The tensors may live on the host or on the device.
struct DecodeScheduleView {
  TensorView parts;       ///< (num_parts, 8) int32, rows as DecodePart
  TensorView num_splits;  ///< (b + 1) int32, exclusive prefix sum of splits per request
  int block_size = 64;
  int fixed_split_blocks = 0;
  PartUnit unit = PartUnit::kBlocks;
};

/// The split plan of a batch: which worker handles which tokens of which request. A pure function of the
/// lengths and the options, so one schedule serves every layer of a decoding step.
///
/// Every request has at least one split, also one without keys. Without fixed_split_blocks the number of
/// splits of all split requests together is at most 2 * num_parts.
class DecodeSchedule {
 public:
  DecodeSchedule() = default;

  /// Plans for `cache_seqlens` (tokens per request, each >= 0). Throws InvalidArgument for a negative
  /// length or an option out of range. O(b + num_parts).
  FLASH_MLA_API static DecodeSchedule build(std::span<const std::int32_t> cache_seqlens,
                                            const ScheduleOptions& options);

  std::span<const DecodePart> parts() const { return parts_; }
  std::span<const std::int32_t> num_splits() const { return num_splits_; }
  const ScheduleOptions& options() const { return options_; }

  /// Blocks per worker that the plan aims at, the fixed overhead included.
  std::int64_t payload_blocks() const { return payload_blocks_; }

  /// A view on this object's storage; valid as long as the object is.
  FLASH_MLA_API DecodeScheduleView view() const;

  /// How evenly the parts share the work: blocks of all parts over num_parts times those of the busiest, 1 if
  /// all have as many, 0 if there are none. `cache_seqlens` are those the plan was made for.
  FLASH_MLA_API double balance(std::span<const std::int32_t> cache_seqlens) const;

  /// The same plan in the form FlashMLA wrote until September 2025: rows of eight int32 (begin_req,
  /// begin_token, end_req, end_token, begin_split, 0, 0, 0) with end_req inclusive.
  FLASH_MLA_API std::vector<std::int32_t> to_token_rows(std::span<const std::int32_t> cache_seqlens) const;

 private:
  ScheduleOptions options_{};
  std::int64_t payload_blocks_ = 0;
  std::vector<DecodePart> parts_;
  std::vector<std::int32_t> num_splits_{0};
};

/// Plans into caller-owned memory without allocating: `parts` has num_parts elements, `num_splits` b + 1.
FLASH_MLA_API void build_decode_schedule(std::span<const std::int32_t> cache_seqlens,
                                         const ScheduleOptions& options, std::span<DecodePart> parts,
                                         std::span<std::int32_t> num_splits);

/// Plans on whatever device the tensors live on, in the unit that `schedule` says: cache_seqlens (b) int32,
/// contiguous; schedule.parts (num_parts, 8) and schedule.num_splits (b + 1) are written. `options` and
/// `schedule` agree on num_parts, block_size and fixed_split_blocks.
///
/// On the CPU this is the function above, and lengths are checked. On a GPU one kernel is queued on `stream`
/// (a cudaStream_t): nothing is allocated, read back or waited for, so a CUDA graph may capture it, and every
/// replay plans anew for the lengths it finds; a negative length counts as 0. Both give the same plan, bit
/// for bit. On a GPU b + 3 * num_parts may be up to 11430.
///
/// Throws InvalidArgument (message: argument, value, what was expected) or Unsupported.
FLASH_MLA_API void build_decode_schedule(const TensorView& cache_seqlens, const ScheduleOptions& options,
                                         const DecodeScheduleView& schedule, void* stream = nullptr);

/// Options that suit the sm90 backend on CUDA device `device_index` for calls of these shapes: one part per
/// cluster of CTAs that the GPU runs at a time, and a fixed overhead that is smaller where the batch is small
/// against that, for there a part more is worth a split more. `batch` 0: not known, as if it were large.
/// num_parts is the same for every batch: a schedule may be copied over another's of the same shapes.
/// Throws Unsupported where that GPU is missing or not a Hopper, InvalidArgument for a count below 1 (batch:
/// 0) or heads that num_heads_k does not divide.
FLASH_MLA_API ScheduleOptions cuda_schedule_options(int device_index, int s_q, int num_heads_q,
                                                    int num_heads_k, int batch = 0);

/// Options that suit the CPU backend with `num_threads` workers (0: all that OpenMP would use).
FLASH_MLA_API ScheduleOptions cpu_schedule_options(int num_threads = 0);

}  // namespace flash_mla
