#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace flash_mla::text {

/// Byte pair encoding of one word: tokens of its bytes, merged pair by pair in the order of the merges'
/// ranks.
class Bpe {
 public:
  static constexpr std::int32_t kNone = -1;

  Bpe() { byte_tokens_.fill(kNone); }

  /// The token of a single byte. A byte without one is left out of every word.
  void set_byte(unsigned char byte, std::int32_t token) { byte_tokens_[byte] = token; }
  bool has_every_byte() const;
  /// The next merge: `left` `right` become `merged`. The same pair again takes the later rank.
  void add_merge(std::int32_t left, std::int32_t right, std::int32_t merged);

  /// Appends the tokens of `word`, of less than 2^31 bytes. Time n log n in its length.
  void encode(std::string_view word, std::vector<std::int32_t>& out) const;

 private:
  struct Merge {
    std::uint32_t rank;
    std::int32_t token;
  };
  const Merge* find(std::int32_t left, std::int32_t right) const;

  std::array<std::int32_t, 256> byte_tokens_{};
  std::unordered_map<std::uint64_t, Merge> merges_;
  std::uint32_t next_rank_ = 0;
};

}  // namespace flash_mla::text
