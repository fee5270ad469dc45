#pragma once

#include <string>

// Numbers as people read them: no exponents.

namespace flash_mla::planner {

/// `x` rounded to so many significant digits, without zeros behind the point: 1855000, 0.0000626.
std::string significant(double x, int digits);

/// The fewest digits that read back as `x`.
std::string shortest(double x);

}  // namespace flash_mla::planner
