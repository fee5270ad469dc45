#pragma once

// How a worker reads a schedule: rows of either unit as DecodePart.

#include <algorithm>
#include <cstdint>

#include "flash_mla/schedule.h"

namespace flash_mla {

inline std::int64_t schedule_blocks(std::int64_t length, int block_size) {
  return (length + block_size - 1) / block_size;
}

/// Row p of a host schedule, in blocks.
inline DecodePart schedule_part(const DecodeScheduleView& s, std::int64_t p) {
  const auto* row = s.parts.ptr<const std::int32_t>() + p * s.parts.stride(0);
  DecodePart part;
  part.begin_req = row[0];
  part.begin_split = row[4];
  if (s.unit == PartUnit::kTokens) {
    part.begin_block = row[1] / s.block_size;
    part.end_req = row[2];
    part.end_block = static_cast<std::int32_t>(schedule_blocks(row[3], s.block_size));
  } else {
    part.end_req = row[1];
    part.begin_block = row[2];
    part.end_block = row[3];
  }
  return part;
}

}  // namespace flash_mla
