#include <gtest/gtest.h>

#include "flash_mla/error.h"
#include "grammar/grammar.h"

namespace flash_mla::grammar {
namespace {

TEST(WithoutXGrammar, FormatsAreRefusedByName) {
  Compiler compiler(Vocabulary{1, {"a"}, {}});
  try {
    compiler.compile({TextFormat::Kind::kRegex, "a", {}});
    FAIL() << "expected Unsupported";
  } catch (const Unsupported& e) {
    EXPECT_NE(std::string(e.what()).find("FLASH_MLA_XGRAMMAR"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace flash_mla::grammar
