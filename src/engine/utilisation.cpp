#include "engine/utilisation.h"

#include <algorithm>
#include <vector>

#include "base/page_size.h"

namespace flash_mla::engine {

double schedule_utilisation(std::span<const std::int32_t> lengths, const ScheduleOptions& options) {
  if (lengths.empty()) return 0;
  const DecodeSchedule schedule = DecodeSchedule::build(lengths, options);
  std::int64_t busiest = 0, all = 0;
  for (const DecodePart& part : schedule.parts()) {
    std::int64_t blocks = 0;
    for (std::int32_t r = part.begin_req; r <= part.end_req; ++r) {
      const std::int64_t length = lengths[static_cast<std::size_t>(r)];
      const std::int64_t from = r == part.begin_req ? part.begin_block : 0;
      const std::int64_t to = r == part.end_req ? part.end_block : (length + kPageSize - 1) / kPageSize;
      blocks += to - from;
    }
    busiest = std::max(busiest, blocks);
    all += blocks;
  }
  return busiest == 0
             ? 0
             : static_cast<double>(all) / static_cast<double>(busiest * std::ssize(schedule.parts()));
}

}  // namespace flash_mla::engine
