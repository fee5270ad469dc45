#include "planner/sheet.h"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <stdexcept>

#include "flash_mla/error.h"
#include "planner/equations.h"

namespace flash_mla::planner {
namespace {

double value(std::string_view text) { return Sheet({}, {}).evaluate(text, {}); }

TEST(Sheet, Arithmetic) {
  EXPECT_DOUBLE_EQ(value("1 + 2*3 - 4/8"), 6.5);
  EXPECT_DOUBLE_EQ(value("2^3^2"), 512);
  EXPECT_DOUBLE_EQ(value("-2^2"), -4);
  EXPECT_DOUBLE_EQ(value("(1 + 2)*(3 - 5)"), -6);
  EXPECT_DOUBLE_EQ(value("1.5e3"), 1500);
  EXPECT_DOUBLE_EQ(value("10 - 3 - 2"), 5);
  EXPECT_DOUBLE_EQ(value("64/4/2"), 8);
}

TEST(Sheet, Functions) {
  EXPECT_DOUBLE_EQ(value("min(3, 2) + max(5, 7)"), 9);
  EXPECT_DOUBLE_EQ(value("ceil(7/2) + floor(7/2)"), 7);
  EXPECT_DOUBLE_EQ(value("if(3 > 2, 10, 20)"), 10);
  EXPECT_DOUBLE_EQ(value("if(3 <= 2, 10, 20)"), 20);
  EXPECT_DOUBLE_EQ(value("if(0, 1/0, 4)"), 4);
  EXPECT_DOUBLE_EQ(value("if(2 == 2, 1, 0)"), 1);
  EXPECT_NEAR(value("miss(4, 1, 2)"), 0.5, 1e-15);  // C(3,2)/C(4,2)
  EXPECT_DOUBLE_EQ(value("miss(8, 8, 1)"), 0);
}

TEST(Sheet, BadEquationsAreRefused) {
  for (const char* text : {"1 +", "(1", "1 2", "x", "min(1)", "1)", ""}) {
    EXPECT_THROW(value(text), std::logic_error) << text;
  }
  EXPECT_THROW(Sheet({"a"}, {{"a", "1", "", ""}}), std::logic_error);
}

TEST(Sheet, NonFiniteValuesNameTheEquation) {
  const Sheet s({"a"}, {{"ratio", "1/a", "", ""}});
  std::vector<double> values(s.num_slots(), 0.0);
  try {
    s.evaluate(values);
    FAIL();
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("ratio = 1/a"), std::string::npos) << e.what();
  }
}

TEST(Sheet, SubstitutionReadsBackExactly) {
  const Sheet s({"a", "b'"}, {{"c", "a*b' + min(a, 2)", "", ""}});
  std::vector<double> values(s.num_slots());
  values[s.slot("a")] = 0.1;
  values[s.slot("b'")] = -1.0 / 3;
  s.evaluate(values);
  const std::string text = s.substitute("a*b' + min(a, 2)", values);
  EXPECT_EQ(text.find('a'), std::string::npos) << text;
  EXPECT_EQ(value(text), values[s.slot("c")]);
}

TEST(Sheet, DocumentationShowsEveryEquation) {
  std::ifstream file(FLASH_MLA_PLANNER_DOC);
  std::stringstream text;
  text << file.rdbuf();
  ASSERT_TRUE(file) << FLASH_MLA_PLANNER_DOC;
  for (const Mode mode : {Mode::kArticle, Mode::kExact}) {
    for (const PhaseKind phase : {PhaseKind::kPrefill, PhaseKind::kDecode}) {
      for (const Equation& e : sheet(mode, phase).equations()) {
        const std::string line = std::string(e.name) + " = " + e.text + "\n";
        EXPECT_NE(text.str().find(line), std::string::npos) << line;
      }
    }
  }
}

}  // namespace
}  // namespace flash_mla::planner
