#include "engine/utilisation.h"

namespace flash_mla::engine {

double schedule_utilisation(std::span<const std::int32_t> lengths, const ScheduleOptions& options) {
  return lengths.empty() ? 0 : DecodeSchedule::build(lengths, options).balance(lengths);
}

}  // namespace flash_mla::engine
