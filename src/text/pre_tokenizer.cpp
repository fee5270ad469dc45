#include "text/pre_tokenizer.h"

#include <fmt/format.h>

#include "text/unicode_additions.h"

namespace flash_mla::text {
namespace {

// GPT-2's words, which ByteLevel cuts by itself unless use_regex is false.
constexpr const char* kGpt2Words =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

std::string escape_literal(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (std::string_view("\\^$.[]|()?*+{}-&").find(c) != std::string_view::npos) out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

PreTokenizer PreTokenizer::parse(const JsonObject& json) {
  PreTokenizer out;
  if (json.string("type") != "Sequence") {
    out.add(json, true);
    return out;
  }
  const Json& parts = json.array("pretokenizers");
  if (parts.empty()) json.refuse("pretokenizers", "a ByteLevel at the end");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const std::string where = fmt::format("pre_tokenizer.pretokenizers[{}].", i);
    out.add(JsonObject(parts[i], json.origin(), where), i + 1 == parts.size());
  }
  return out;
}

void PreTokenizer::add(const JsonObject& json, bool last) {
  const std::string type = json.string("type");
  if (last != (type == "ByteLevel")) {
    json.refuse("type", last ? "\"ByteLevel\", the last pre-tokenizer of a byte-level BPE"
                             : "\"Split\" or \"Digits\"");
  }
  if (type == "ByteLevel") {
    if (json.boolean_or("add_prefix_space", true)) json.refuse("add_prefix_space", "false");
    if (json.boolean_or("use_regex", true)) expressions_.emplace_back(kGpt2Words, json.path("use_regex"));
  } else if (type == "Split") {
    if (json.string("behavior") != "Isolated") json.refuse("behavior", "\"Isolated\"");
    // Pieces between matches are pieces as well, so that it does not matter which of both is inverted.
    json.boolean_or("invert", false);
    const JsonObject pattern = json.object("pattern");
    const bool literal = pattern.has("String");
    const std::string text = pattern.string(literal ? "String" : "Regex");
    expressions_.emplace_back(literal ? escape_literal(text) : text,
                              pattern.path(literal ? "String" : "Regex"));
  } else if (type == "Digits") {
    const bool each = json.boolean_or("individual_digits", false);
    const std::string digit = "[\\p{N}" + std::string(kUnicode17Digits) + "]";
    expressions_.emplace_back(each ? digit : digit + "+", json.path("individual_digits"));
  } else {
    json.refuse("type", "\"Split\", \"Digits\" or \"ByteLevel\"");
  }
}

std::vector<std::string_view> PreTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> words, next;
  if (!text.empty()) words.push_back(text);
  for (const Regex& expression : expressions_) {
    next.clear();
    for (const std::string_view word : words) expression.split(word, next);
    std::swap(words, next);
  }
  return words;
}

}  // namespace flash_mla::text
