// Arbitrary bytes as a tokenizer.json, a NUL and a text. A file that is refused must leave a message that
// names it; with one that is accepted, every text has tokens of the vocabulary, and they have a text, the
// same at once and bit by bit.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/error.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace {

using namespace flash_mla::text;

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const Tokenizer& tokenizer, std::string_view text) {
  for (const bool allow_special : {true, false}) {
    std::vector<TokenId> ids;
    try {
      ids = tokenizer.encode(text, /*add_special_tokens=*/true, allow_special);
    } catch (const flash_mla::InvalidArgument& e) {
      require(std::string_view(e.what()).starts_with("text"));  // its expressions reach their limits
      continue;
    }
    StreamDecoder stream(tokenizer);
    std::string streamed;
    for (const TokenId id : ids) {
      require(id >= 0 && id < tokenizer.vocab_size());
      streamed += stream.push(id);
      tokenizer.id_to_token(id);
    }
    streamed += stream.flush();
    require(streamed == tokenizer.decode(ids));
    std::string storage;
    require(replace_invalid_utf8(streamed, storage) == streamed);
  }
  const std::size_t half = text.size() / 2;
  const TextPart parts[] = {{std::string(text.substr(0, half)), true},
                            {std::string(text.substr(half)), false}};
  try {
    for (const TokenId id : tokenizer.encode_parts(parts)) require(id >= 0 && id < tokenizer.vocab_size());
  } catch (const flash_mla::InvalidArgument& e) {
    require(std::string_view(e.what()).starts_with("text"));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const std::size_t end = std::min(input.find('\0'), size);
  try {
    check(Tokenizer::parse(input.substr(0, end), "fuzz"), input.substr(std::min(end + 1, size)));
  } catch (const flash_mla::InvalidArgument& e) {
    require(std::string_view(e.what()).starts_with("fuzz: "));
  } catch (const flash_mla::Unsupported& e) {
    require(std::string_view(e.what()).starts_with("fuzz: "));
  }
  return 0;
}
