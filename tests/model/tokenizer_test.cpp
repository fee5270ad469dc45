#include "text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <ctime>
#include <functional>

#include "base/json.h"
#include "flash_mla/error.h"
#include "temporary_directory.h"
#include "text/byte_alphabet.h"

namespace flash_mla::text {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Bytes are their own tokens; "ab" 256, "abc" 257, "bc" 258; "<s>" 259 is special, "<x>" 260 is not.
Json small() {
  Json vocab;
  for (int byte = 0; byte < 256; ++byte) vocab[byte_letter(static_cast<unsigned char>(byte))] = byte;
  vocab["ab"] = 256;
  vocab["abc"] = 257;
  vocab["bc"] = 258;
  const auto added = [](int id, const char* content, bool special) {
    return Json{{"id", id},        {"content", content}, {"special", special},  {"normalized", false},
                {"lstrip", false}, {"rstrip", false},    {"single_word", false}};
  };
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", {added(259, "<s>", true), added(260, "<x>", false)}},
      {"normalizer", {{"type", "Sequence"}, {"normalizers", Json::array()}}},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Split"}, {"pattern", {{"Regex", "\\s+"}}}, {"behavior", "Isolated"}, {"invert", false}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"byte_fallback", false},
        {"vocab", vocab},
        {"merges", {"a b", "ab c", "b c"}}}}};
}

Tokenizer parse(const Json& json) { return Tokenizer::parse(json.dump(), "tokenizer.json"); }

TEST(Tokenizer, FindsAddedTokensInControlPartsOnly) {
  const Tokenizer t = parse(small());
  const auto encode = [&](std::vector<TextPart> parts) { return t.encode_parts(parts); };
  EXPECT_THAT(encode({{"<s>a<x>", true}}), ElementsAre(259, 'a', 260));
  EXPECT_THAT(encode({{"<s><x>", false}}), ElementsAre('<', 's', '>', '<', 'x', '>'));
  EXPECT_THAT(encode({{"<s>", true}, {"<s>", false}, {"<x>", true}}), ElementsAre(259, '<', 's', '>', 260));
  // Nor can a content make one together with its surroundings, or hide one behind it.
  EXPECT_THAT(encode({{"<", false}, {"s>", true}}), ElementsAre('<', 's', '>'));
  EXPECT_THAT(encode({{"<s", true}, {">", false}}), ElementsAre('<', 's', '>'));
  EXPECT_THAT(encode({{"<", false}, {"<s>", true}}), ElementsAre('<', 259));
  // Words go on from part to part.
  EXPECT_THAT(encode({{"a", true}, {"b", false}, {"c", true}}), ElementsAre(257));
  EXPECT_TRUE(encode({}).empty());
}

// Of the processor's: others may keep it busy.
double seconds_of(const std::function<void()>& f) {
  const std::clock_t begin = std::clock();
  f();
  return static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
}

TEST(Tokenizer, TakesTimeInProportionToControlTokens) {
  // A conversation of empty messages is one long run of tokens of one kind and none of the other.
  const Tokenizer t = parse(small());
  const auto run = [&](std::size_t messages) {
    const std::vector<TextPart> parts(messages, TextPart{"<s>", true});
    return seconds_of([&] { EXPECT_EQ(t.encode_parts(parts).size(), messages); });
  };
  run(1000);
  const double once = run(50'000), four_times = run(200'000);
  EXPECT_LT(four_times, std::max(8 * once, 0.1));
  EXPECT_LT(four_times, 5);  // measured: 0.02
}

TEST(Tokenizer, MergesInOrderOfRank) {
  const Tokenizer t = parse(small());
  EXPECT_THAT(t.encode("abcbcab"), ElementsAre(257, 258, 256));
  EXPECT_THAT(t.encode("a b"), ElementsAre('a', ' ', 'b'));
  EXPECT_TRUE(t.encode("").empty());
  Json arrays = small();
  arrays["model"]["merges"] = Json::parse(R"([["a", "b"], ["ab", "c"], ["b", "c"]])");
  EXPECT_THAT(parse(arrays).encode("abcbcab"), ElementsAre(257, 258, 256));
}

TEST(Tokenizer, AddedTokens) {
  const Tokenizer t = parse(small());
  EXPECT_THAT(t.encode("ab<s>ab<x>"), ElementsAre(256, 259, 256, 260));
  EXPECT_THAT(t.encode("<s><x>", true, false), ElementsAre('<', 's', '>', 260));
  EXPECT_EQ(t.decode(t.encode("ab<s>ab<x>")), "abab<x>");
  EXPECT_EQ(t.decode(t.encode("ab<s>ab<x>"), false), "ab<s>ab<x>");
  EXPECT_TRUE(t.is_special(259));
  EXPECT_FALSE(t.is_special(260));
  EXPECT_FALSE(t.is_special(-1));
  EXPECT_FALSE(t.is_special(1000));
  EXPECT_EQ(t.vocab_size(), 261);
  EXPECT_EQ(t.token_to_id("<x>"), 260);
}

TEST(Tokenizer, InvalidUtf8IsReplaced) {
  const Tokenizer t = parse(small());
  EXPECT_THAT(t.encode("\xff"), ElementsAre(0xef, 0xbf, 0xbd));
  EXPECT_EQ(t.decode(std::vector<TokenId>{0xf0, 0x9f, 'a'}),
            "\xef\xbf\xbd"
            "a");
}

TEST(StreamDecoder, NeverEmitsHalfASequence) {
  const Tokenizer t = parse(small());
  StreamDecoder d(t);
  EXPECT_EQ(d.push('a'), "a");
  EXPECT_EQ(d.push(0xf0), "");
  EXPECT_EQ(d.push(0x9f), "");
  EXPECT_EQ(d.push(259), "");  // a special token between the bytes is left out
  EXPECT_EQ(d.push(0x99), "");
  EXPECT_EQ(d.push(0x82), "🙂");
  EXPECT_EQ(d.push(0xe4), "");
  EXPECT_EQ(d.push('b'),
            "\xef\xbf\xbd"
            "b");
  EXPECT_EQ(d.push(0xe4), "");
  EXPECT_EQ(d.push(5000), "");
  EXPECT_EQ(d.flush(), "\xef\xbf\xbd");
  EXPECT_EQ(d.flush(), "");
  EXPECT_EQ(d.push('c'), "c");
}

struct Bend {
  std::string what;
  std::function<void(Json&)> bend;
  std::string message;  // a part of it
};

class UnsupportedTokenizer : public ::testing::TestWithParam<Bend> {};

TEST_P(UnsupportedTokenizer, NamesTheFeature) {
  Json json = small();
  GetParam().bend(json);
  EXPECT_THAT(message_of<Unsupported>([&] { parse(json); }),
              HasSubstr("tokenizer.json: " + GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Tokenizer, UnsupportedTokenizer,
    ::testing::Values(
        Bend{"Unigram", [](Json& j) { j["model"]["type"] = "Unigram"; }, "model.type = \"Unigram\""},
        Bend{"Fallback", [](Json& j) { j["model"]["byte_fallback"] = true; }, "model.byte_fallback = true"},
        Bend{"Dropout", [](Json& j) { j["model"]["dropout"] = 0.1; }, "model.dropout = 0.1"},
        Bend{"Prefix", [](Json& j) { j["model"]["continuing_subword_prefix"] = "##"; },
             "model.continuing_subword_prefix"},
        Bend{"Suffix", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; },
             "model.end_of_word_suffix"},
        Bend{"Unknown",
             [](Json& j) {
               j["model"]["vocab"].erase("z");
               j["model"]["unk_token"] = "<s>";
             },
             "model.unk_token"},
        Bend{"Normalizer",
             [](Json& j) {
               j["normalizer"] = {{"type", "NFC"}};
             },
             "normalizer.type = \"NFC\""},
        Bend{"Normalizers",
             [](Json& j) {
               j["normalizer"]["normalizers"] = {{{"type", "NFC"}}};
             },
             "normalizer.normalizers"},
        Bend{"NoPreTokenizer", [](Json& j) { j["pre_tokenizer"] = nullptr; }, "pre_tokenizer = null"},
        Bend{"Metaspace", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["type"] = "Metaspace"; },
             "pre_tokenizer.pretokenizers[0].type = \"Metaspace\""},
        Bend{"NoByteLevel", [](Json& j) { j["pre_tokenizer"]["pretokenizers"].erase(1); },
             "pre_tokenizer.pretokenizers[0].type = \"Split\""},
        Bend{"PrefixSpace",
             [](Json& j) { j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; },
             "pre_tokenizer.pretokenizers[1].add_prefix_space = true"},
        Bend{"Behavior", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; },
             "pre_tokenizer.pretokenizers[0].behavior = \"Removed\""},
        Bend{"Construct",
             [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\w+"; },
             "pre_tokenizer.pretokenizers[0].pattern.Regex = \"\\w+\": \"\\w\""},
        Bend{"Decoder", [](Json& j) { j["decoder"]["type"] = "Metaspace"; }, "decoder.type = \"Metaspace\""},
        Bend{"PostProcessor",
             [](Json& j) {
               j["post_processor"] = {{"type", "BertProcessing"}};
             },
             "post_processor.type = \"BertProcessing\""},
        Bend{"Lstrip", [](Json& j) { j["added_tokens"][1]["lstrip"] = true; },
             "added_tokens[1].lstrip = true"},
        Bend{"Truncation",
             [](Json& j) {
               j["truncation"] = {{"max_length", 5}};
             },
             "truncation"}),
    [](const auto& bend) { return bend.param.what; });

class WrongTokenizer : public ::testing::TestWithParam<Bend> {};

TEST_P(WrongTokenizer, NamesTheField) {
  Json json = small();
  GetParam().bend(json);
  EXPECT_THAT(message_of<InvalidArgument>([&] { parse(json); }),
              HasSubstr("tokenizer.json: " + GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Tokenizer, WrongTokenizer,
    ::testing::Values(
        Bend{"NoModel", [](Json& j) { j.erase("model"); }, "model is missing"},
        Bend{"NegativeId", [](Json& j) { j["model"]["vocab"]["ab"] = -1; }, "model.vocab.ab = -1"},
        Bend{"HugeId", [](Json& j) { j["model"]["vocab"]["ab"] = 1u << 30; }, "model.vocab.ab = 1073741824"},
        Bend{"SharedId", [](Json& j) { j["model"]["vocab"]["zz"] = 256; }, "token 256 is both"},
        Bend{"AddedSharesId", [](Json& j) { j["added_tokens"][0]["id"] = 256; }, "token 256 is both"},
        Bend{"AddedElsewhere", [](Json& j) { j["added_tokens"][0]["content"] = "ab"; },
             "added_tokens[0].id = 259: expected 256"},
        Bend{"EmptyAdded", [](Json& j) { j["added_tokens"][0]["content"] = ""; },
             "added_tokens[0].content = \"\""},
        Bend{"MergeUnknown", [](Json& j) { j["model"]["merges"][1] = "ab d"; }, "model.merges[1] = \"ab d\""},
        Bend{"MergeOfOne", [](Json& j) { j["model"]["merges"][1] = "ab"; }, "model.merges[1] = \"ab\""},
        Bend{"MergeOfThree", [](Json& j) { j["model"]["merges"][1] = "a b c"; },
             "model.merges[1] = \"a b c\""},
        Bend{"MergeNumber", [](Json& j) { j["model"]["merges"][1] = 7; }, "model.merges[1] = 7"},
        Bend{"Pattern", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a"; },
             "pre_tokenizer.pretokenizers[0].pattern.Regex = \"(a\""}),
    [](const auto& bend) { return bend.param.what; });

TEST(Tokenizer, ADirectoryMustSayWhatStandsInFront) {
  const TemporaryDirectory directory;
  directory.write("tokenizer.json", small().dump());
  EXPECT_THAT(message_of<InvalidArgument>([&] { Tokenizer::open(directory.path()); }),
              HasSubstr("tokenizer_config.json: cannot be read; expected it beside tokenizer.json"));
  directory.write("tokenizer_config.json", R"({"add_bos_token": true, "bos_token": "<s>"})");
  EXPECT_THAT(Tokenizer::open(directory.path()).encode("a"), ElementsAre(259, 'a'));
  // The tokenizer itself may say it.
  const TemporaryDirectory alone;
  Json json = small();
  json["post_processor"] = {
      {"type", "TemplateProcessing"},
      {"single",
       {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
      {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {259}}, {"tokens", {"<s>"}}}}}}};
  alone.write("tokenizer.json", json.dump());
  EXPECT_THAT(Tokenizer::open(alone.path()).encode("a"), ElementsAre(259, 'a'));
}

TEST(Tokenizer, ALfsPointerIsNoTokenizer) {
  EXPECT_THAT(message_of<InvalidArgument>([] {
                Tokenizer::parse("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n",
                                 "t.json");
              }),
              HasSubstr("t.json: a Git LFS pointer, not the file itself (1234 bytes)"));
}

TEST(Tokenizer, NotJson) {
  EXPECT_THAT(message_of<InvalidArgument>([] { Tokenizer::parse("{", "t.json"); }),
              HasSubstr("t.json: not valid JSON"));
}

}  // namespace
}  // namespace flash_mla::text
