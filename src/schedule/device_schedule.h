#pragma once

// The plan made on a GPU, by one kernel. Free of CUDA headers.

#include <cstdint>

#include "flash_mla/schedule.h"
#include "schedule/options.h"

namespace flash_mla::sm90 {

/// What the kernel keeps in 48 KB of shared memory: see ScheduleMemory.
inline constexpr int kMaxScheduleWords = 12200;
inline constexpr int kMaxStops = 256;
constexpr std::int64_t schedule_words(std::int64_t batch, std::int64_t num_parts) {
  return batch + 1 + 3 * num_parts + 1 + std::int64_t{3} * kMaxStops;
}

/// The lists of sparse decode: a request is as long as both of its lists, each padded to whole blocks.
struct ListLengths {
  const std::int32_t* topk_length[2];  ///< (batch), or null: every list has topk entries
  int topk[2];                         ///< entries at most
};

struct ScheduleParams {
  const std::int32_t* cache_seqlens;  ///< not of lists
  int batch;
  int num_parts;
#define FLASH_MLA_DECLARE(name, ...) int name;  ///< see ScheduleOptions
  FLASH_MLA_SCHEDULE_OPTIONS(FLASH_MLA_DECLARE)
#undef FLASH_MLA_DECLARE
  bool token_rows;           ///< rows as FlashMLA's until September 2025
  std::int32_t* parts;       ///< (num_parts, 8)
  std::int32_t* num_splits;  ///< (batch + 1)
  ListLengths lists;         ///< of launch_list_schedule
};

inline void set_options(ScheduleParams& params, const ScheduleOptions& options) {
  params.num_parts = options.num_parts;
#define FLASH_MLA_COPY(name, ...) params.name = options.name;
  FLASH_MLA_SCHEDULE_OPTIONS(FLASH_MLA_COPY)
#undef FLASH_MLA_COPY
}

/// Queues the kernel on `stream`, a cudaStream_t of the current device. schedule_words(batch, num_parts) is
/// at most kMaxScheduleWords.
void launch_schedule(const ScheduleParams& params, void* stream);
/// The same over the lists of sparse decode.
void launch_list_schedule(const ScheduleParams& params, void* stream);

}  // namespace flash_mla::sm90
