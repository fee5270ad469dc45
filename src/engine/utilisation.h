#pragma once

#include <cstdint>
#include <span>

#include "flash_mla/schedule.h"

namespace flash_mla::engine {

/// How evenly decode attention over sequences of `lengths` is divided among its workers: blocks of its
/// schedule over what the workers could have done in the time of the busiest, in [0, 1]; 0 for no sequences.
double schedule_utilisation(std::span<const std::int32_t> lengths, const ScheduleOptions& options);

}  // namespace flash_mla::engine
