#pragma once

// Which kernels the sm90 backend would run a shape with, and how: `flash-mla bench --explain`.

#include <string>
#include <vector>

#include "bench/preset.h"

namespace flash_mla::bench {

/// Why the sm90 backend does not take a shape, or "".
std::string why_not_sm90(const Shape& shape);

/// A line of the table for every shape, then what its columns say. Needs no GPU: without one it takes 132
/// multiprocessors for granted and says so.
std::string explain(const std::vector<Shape>& shapes);

}  // namespace flash_mla::bench
