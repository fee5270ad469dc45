// Schemas, regular expressions and grammars of strangers, and texts of what they allow: bytes that the mask allows must be
// accepted, and what ends must end.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "flash_mla/error.h"
#include "grammar/grammar.h"

using namespace flash_mla;

namespace {

constexpr int kEnd = 256;

grammar::Compiler& compiler() {
  static grammar::Compiler made([] {
    grammar::Vocabulary bytes{kEnd + 1, {}, {kEnd}};
    for (int byte = 0; byte < 256; ++byte) bytes.bytes.emplace_back(1, static_cast<char>(byte));
    bytes.bytes.emplace_back();
    return bytes;
  }());
  return made;
}

bool is_allowed(const std::vector<std::uint32_t>& mask, int token) {
  const auto t = static_cast<std::size_t>(token);
  return (mask[t / 32] >> (t % 32) & 1) != 0;
}

void walk(const grammar::Grammar& grammar, std::uint64_t seed) {
  const std::unique_ptr<grammar::Matcher> matcher = grammar.matcher({kEnd});
  std::vector<std::uint32_t> mask((kEnd + 1 + 31) / 32);
  for (int step = 0; step < 40 && !matcher->ended(); ++step) {
    matcher->allowed(mask);
    std::vector<int> tokens;
    for (int token = 0; token <= kEnd; ++token) {
      if (is_allowed(mask, token)) tokens.push_back(token);
    }
    if (tokens.empty()) return;  // a grammar may lead nowhere
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const int token = tokens[(seed >> 33) % tokens.size()];
    if (!matcher->accept(token)) __builtin_trap();
    if (matcher->ended() != (token == kEnd)) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  constexpr TextFormat::Kind kKinds[] = {TextFormat::Kind::kJsonSchema, TextFormat::Kind::kRegex,
                                         TextFormat::Kind::kGrammar};
  const TextFormat format{kKinds[data[0] % 3], std::string(data + 1, data + size), {}};
  try {
    walk(*compiler().compile(format), data[0]);
  } catch (const InvalidArgument&) {
  } catch (const Unsupported&) {
  }
  return 0;
}
