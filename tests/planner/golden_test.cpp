// Every cell of golden.json: the article's printed numbers, recomputed and corrected.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "planner/read.h"
#include "planner/sheet.h"
#include "planner/tables.h"

namespace flash_mla::planner {
namespace {

Json golden() {
  std::ifstream file(FLASH_MLA_GOLDEN);
  return Json::parse(file);
}

/// The expected numbers were written with six significant digits or fewer: half a unit of the last one
/// written.
double half_unit(double value, int least_digits) {
  std::string digits = Json(value).dump();
  if (digits.ends_with(".0")) digits.resize(digits.size() - 2);
  digits.erase(std::remove_if(digits.begin(), digits.end(), [](char c) { return c == '.' || c == '-'; }),
               digits.end());
  digits.erase(0, digits.find_first_not_of('0'));
  const int significant = std::max<int>(least_digits, static_cast<int>(digits.size()));
  return 0.5 * std::pow(10.0, std::floor(std::log10(std::abs(value))) + 1 - significant) * (1 + 1e-6);
}

TEST(Golden, EveryCellInBothModes) {
  const Json expected = golden();
  const std::vector<TableCell> cells = article_tables();
  ASSERT_EQ(cells.size(), expected.size());
  std::set<std::string> unknown;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    const TableCell& cell = cells[i];
    const Json& want = expected[i];
    SCOPED_TRACE(cell.section + ": " + cell.name);
    ASSERT_EQ(cell.section, want["sec"].get<std::string>());
    ASSERT_EQ(cell.name, want["cell"].get<std::string>());
    EXPECT_EQ(cell.printed, want["article"].get<std::string>());
    EXPECT_EQ(cell.unit, want["unit"].get<std::string>());
    if (!cell.article) {
      unknown.insert(cell.name);
      EXPECT_EQ(cell.verdict, "inputs unknown");
      continue;
    }
    const double stated = want["stated"].get<double>();
    EXPECT_NEAR(*cell.article, stated, 1e-7 * std::abs(stated));
    const std::string status = want["status"].get<std::string>();
    EXPECT_EQ(cell.verdict, status.substr(0, status.find(' ')));
    ASSERT_TRUE(cell.exact.has_value());
    if (want["exact"].is_number()) {
      const double exact = want["exact"].get<double>();
      EXPECT_NEAR(*cell.exact, exact, half_unit(exact, 5));
    }
  }
  // Before-and-after figures that neither golden.json nor its reference contains.
  EXPECT_EQ(unknown, (std::set<std::string>{"success rate +", "P99", "power", "servers", "node throughput",
                                            "electricity", "racks", "price 1", "price 2", "price 3"}));
}

TEST(Golden, VerdictFollowsThePrintedRounding) {
  EXPECT_EQ(verdict("55", 55.0625), "match");
  EXPECT_EQ(verdict("34", 34.53), "MISMATCH");
  EXPECT_EQ(verdict("657", 656.463), "near");
  EXPECT_EQ(verdict("86.3%", 86.268), "match");
  EXPECT_EQ(verdict("1.0", 1.0486), "match");
  EXPECT_EQ(verdict("0.000383", 0.0003836967), "near");
}

TEST(Golden, SubstitutedTextGivesTheSameValue) {
  const Sheet empty({}, {});
  const std::vector<double> none;
  for (const TableCell& cell : article_tables()) {
    if (!cell.article) continue;
    SCOPED_TRACE(cell.name);
    EXPECT_DOUBLE_EQ(empty.evaluate(cell.article_substituted, none), *cell.article);
    EXPECT_DOUBLE_EQ(empty.evaluate(cell.exact_substituted, none), *cell.exact);
  }
}

}  // namespace
}  // namespace flash_mla::planner
