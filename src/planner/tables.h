#pragma once

// Every number the source article prints, recomputed from its own expression and with the corrections.

#include <optional>
#include <string>
#include <vector>

namespace flash_mla::planner {

struct TableCell {
  std::string section, name, printed, unit, note;
  std::string article_text, article_substituted;
  std::optional<double> article;  ///< none: the expression's inputs are not known
  std::string exact_text, exact_substituted;
  std::optional<double> exact;
  std::string verdict;  ///< match, near, MISMATCH, or "inputs unknown"
};

std::vector<TableCell> article_tables();

/// "match" when `printed` is the correct rounding of `value`, "near" within 1 %, else "MISMATCH".
std::string verdict(const std::string& printed, double value);

}  // namespace flash_mla::planner
