#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"

namespace flash_mla::grammar {

/// Every byte, some longer tokens, two that are special (no text), one that ends, and one past the tokenizer's.
inline constexpr std::int32_t kFirstWord = 256;
inline const std::vector<std::string> kWords = {
    "true",    "fal", "se",       "{\"", "\": ", "</think>", "\n\n",       ">{",
    "<think>", "abc", "\xe5\xa4", "123", "</th", "ink>\n\n", "ink>\n\nno", "think>"};
inline const std::int32_t kSpecial = kFirstWord + static_cast<std::int32_t>(kWords.size());
inline const std::int32_t kEnd = kSpecial + 2;
inline const std::int32_t kPadding = kEnd + 1;
inline const std::int32_t kSize = kPadding + 1;

inline Vocabulary tiny_vocabulary() {
  Vocabulary out{kSize, {}, {kEnd}};
  for (int byte = 0; byte < 256; ++byte) out.bytes.emplace_back(1, static_cast<char>(byte));
  for (const std::string& word : kWords) out.bytes.push_back(word);
  out.bytes.resize(static_cast<std::size_t>(kPadding));
  return out;
}

inline Compiler& compiler() {
  static Compiler made(tiny_vocabulary());
  return made;
}

/// A text on its way.
class Text {
 public:
  explicit Text(const TextFormat& format, std::vector<std::int32_t> ends = {kEnd})
      : matcher_(compiler().compile(format)->matcher(std::move(ends))) {}

  bool allows(std::int32_t token) {
    fill();
    return allowed(token);
  }
  bool allows(std::string_view byte) { return allows(static_cast<unsigned char>(byte.at(0))); }
  /// Every token that may come next.
  std::vector<std::int32_t> allowed() {
    fill();
    std::vector<std::int32_t> out;
    for (std::int32_t token = 0; token < kSize; ++token) {
      if (allowed(token)) out.push_back(token);
    }
    return out;
  }
  /// Byte by byte; false at the first that may not come.
  bool add(std::string_view text) {
    for (const char c : text) {
      const auto token = static_cast<std::int32_t>(static_cast<unsigned char>(c));
      if (!allows(token) || !matcher_->accept(token)) return false;
    }
    return true;
  }
  /// A token that the mask allows.
  bool add_token(std::int32_t token) { return allows(token) && matcher_->accept(token); }
  bool accept(std::int32_t token) { return matcher_->accept(token); }
  bool may_end() { return allows(kEnd); }
  bool ended() const { return matcher_->ended(); }

 private:
  void fill() {
    mask_.assign(static_cast<std::size_t>(kSize + 31) / 32, 0xdeadbeef);
    matcher_->allowed(mask_);
  }
  bool allowed(std::int32_t token) const {
    return (mask_[static_cast<std::size_t>(token) / 32] >> (token % 32) & 1) != 0;
  }

  std::unique_ptr<Matcher> matcher_;
  std::vector<std::uint32_t> mask_;
};

/// Whether `text` is one, to its end.
inline bool is_text(const TextFormat& format, std::string_view text) {
  Text t(format);
  return t.add(text) && t.may_end();
}

/// A random walk through what a format allows, which ends as soon as it may behind `at_least` tokens; empty if
/// it does not.
inline std::string random_text(const TextFormat& format, unsigned seed, int at_least = 0,
                               int at_most = 2000) {
  std::vector<std::string> bytes = tiny_vocabulary().bytes;
  bytes.resize(kSize);
  std::mt19937 random(seed);
  Text text(format);
  std::string out;
  for (int step = 0; step < at_most; ++step) {
    std::vector<std::int32_t> tokens = text.allowed();
    if (tokens.empty()) return {};
    const bool may_end = std::ranges::count(tokens, kEnd) > 0;
    // Of ASCII alone: parsers want characters whole, and where the walk ends must not matter.
    std::erase_if(tokens, [&](std::int32_t token) {
      return token == kEnd ||
             std::ranges::any_of(bytes[static_cast<std::size_t>(token)], [](char c) { return c < 0; });
    });
    const bool end = may_end && (tokens.empty() || step >= at_least);
    if (!end && tokens.empty()) return {};
    const std::int32_t token = end ? kEnd : tokens[random() % tokens.size()];
    if (!text.add_token(token)) return {};
    if (end) return out;
    out += bytes[static_cast<std::size_t>(token)];
  }
  return {};
}

}  // namespace flash_mla::grammar
