#include "text/utf8.h"

#include <gtest/gtest.h>

namespace flash_mla::text {
namespace {

std::string replaced(std::string_view text) {
  std::string storage;
  return std::string(replace_invalid_utf8(text, storage));
}

TEST(Utf8, ValidTextIsNotCopied) {
  const std::string text = "aé敏🙂";
  std::string storage;
  EXPECT_EQ(replace_invalid_utf8(text, storage).data(), text.data());
}

// The examples of the Unicode standard, tables 3-8 to 3-11, R for U+FFFD.
TEST(Utf8, MaximalSubparts) {
  const std::string r = "\xef\xbf\xbd";
  EXPECT_EQ(replaced("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(replaced("\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(replaced("\xf4\x91\x92\x93\xff\x41\x80\xbf\x42"), r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(replaced("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41"), r + r + r + r + "A");
}

TEST(Utf8, IncompleteSuffix) {
  EXPECT_EQ(incomplete_utf8_suffix(""), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("a"), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("🙂"), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xf0"), 1u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xf0\x9f"), 2u);
  EXPECT_EQ(incomplete_utf8_suffix("a\xf0\x9f\x99"), 3u);
  EXPECT_EQ(incomplete_utf8_suffix("\xf0\x80"), 0u);      // overlong: nothing completes it
  EXPECT_EQ(incomplete_utf8_suffix("\xed\xa0"), 0u);      // a surrogate
  EXPECT_EQ(incomplete_utf8_suffix("\x80\x80\x80"), 0u);  // no beginning
  EXPECT_EQ(incomplete_utf8_suffix("\xc3\xa9\x80"), 0u);
  EXPECT_EQ(incomplete_utf8_suffix("\xff"), 0u);
}

TEST(Utf8, CodePoints) {
  for (const char32_t c : {U'\0', U'a', U'\u07ff', U'\u0800', U'\uffff', U'\U00010000', U'\U0010ffff'}) {
    std::string text;
    append_utf8(c, text);
    EXPECT_EQ(utf8_to_code_points(text), std::u32string(1, c));
    EXPECT_EQ(replaced(text), text);
  }
}

}  // namespace
}  // namespace flash_mla::text
