#include "bench/table.h"

#include <fmt/format.h>

#include <algorithm>

namespace flash_mla::bench {

std::string Table::str() const {
  std::vector<std::size_t> width(rows_.front().size(), 0);
  for (const auto& row : rows_) {
    for (std::size_t c = 0; c < width.size(); ++c) width[c] = std::max(width[c], row.at(c).size());
  }
  std::string text;
  for (const auto& row : rows_) {
    text += fmt::format("{:<{}}", row[0], width[0]);
    for (std::size_t c = 1; c < width.size(); ++c) text += fmt::format("  {:>{}}", row[c], width[c]);
    text += '\n';
  }
  return text;
}

}  // namespace flash_mla::bench
