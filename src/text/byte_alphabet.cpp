#include "text/byte_alphabet.h"

#include <array>

#include "text/utf8.h"

namespace flash_mla::text {
namespace {

bool prints(unsigned byte) {
  return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

struct Alphabet {
  std::array<char32_t, 256> letter{};
  std::array<int, 0x180> byte{};

  Alphabet() {
    byte.fill(-1);
    char32_t next = 0x100;
    for (unsigned b = 0; b < 256; ++b) {
      letter[b] = prints(b) ? b : next++;
      byte[letter[b]] = static_cast<int>(b);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

std::string byte_letter(unsigned char byte) {
  std::string out;
  append_utf8(alphabet().letter[byte], out);
  return out;
}

std::optional<std::string> letters_to_bytes(std::string_view word) {
  std::string out;
  for (const char32_t c : utf8_to_code_points(word)) {
    if (c >= alphabet().byte.size() || alphabet().byte[c] < 0) return std::nullopt;
    out += static_cast<char>(alphabet().byte[c]);
  }
  return out;
}

}  // namespace flash_mla::text
