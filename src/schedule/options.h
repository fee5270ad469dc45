#pragma once

#include "flash_mla/schedule.h"

namespace flash_mla {

/// Throws InvalidArgument for an option out of range.
void check_schedule_options(const ScheduleOptions& options);

}  // namespace flash_mla
