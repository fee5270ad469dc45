#pragma once

#include <cstdint>

#include "schedule/device_schedule.h"

namespace flash_mla::sm90 {

/// Where partial results lie when each of a request's two lists is decoded by a kernel of its own, cut into splits of
/// `split_tiles` tiles: those of its first list, then those of its second, at least one of each.
struct SplitTables {
  int batch, split_tiles;
  ListLengths lists;
  /// (batch + 1) each: the splits before those of request r's first list, and before those of its second. The first is what
  /// combining takes as num_splits.
  std::int32_t* num_splits[2];
};

/// Queues the kernel that fills them on `stream`, a cudaStream_t of the current device.
void launch_split_tables(const SplitTables& tables, void* stream);

}  // namespace flash_mla::sm90
