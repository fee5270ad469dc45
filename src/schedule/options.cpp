#include "schedule/options.h"

#include <fmt/format.h>

#include <array>

#include "flash_mla/error.h"

namespace flash_mla {
namespace {

#define FLASH_MLA_FIELD(name, least, most) ScheduleOptionField{#name, &ScheduleOptions::name, least, most},
constexpr std::array kFields{FLASH_MLA_FIELD(num_parts, 1, std::numeric_limits<int>::max())  //
                             FLASH_MLA_SCHEDULE_OPTIONS(FLASH_MLA_FIELD)};
#undef FLASH_MLA_FIELD
static_assert(sizeof(ScheduleOptions) == kFields.size() * sizeof(int), "every option is in the list");

std::string range_text(const ScheduleOptionField& f) {
  if (f.most == std::numeric_limits<int>::max()) return fmt::format(">= {}", f.least);
  return fmt::format("{} {} {}", f.least, f.most == f.least + 1 ? "or" : "to", f.most);
}

}  // namespace

std::span<const ScheduleOptionField> schedule_option_fields() { return kFields; }

void check_schedule_options(const ScheduleOptions& options) {
  for (const ScheduleOptionField& f : kFields) {
    const int value = options.*f.value;
    if (value < f.least || value > f.most) {
      throw InvalidArgument(fmt::format("{} is {}, expected {}", f.name, value, range_text(f)));
    }
  }
}

}  // namespace flash_mla
