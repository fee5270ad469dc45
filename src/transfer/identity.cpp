#define XXH_INLINE_ALL
#include "transfer/identity.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <numeric>

namespace flash_mla::transfer {

// Of the messages between two sides, and what they mean.
constexpr int kProtocol = 1;

std::size_t Identity::bytes_per_page() const {
  return std::accumulate(layer_bytes.begin(), layer_bytes.end(), std::size_t{0});
}

Json to_json(const Identity& i) {
  return {{"protocol", kProtocol},        {"page_tokens", i.page_tokens},
          {"weights", i.weights},         {"page_format", i.page_format},
          {"layer_bytes", i.layer_bytes}, {"batch_invariant", i.batch_invariant}};
}

void check_same(const Identity& mine, const Json& theirs) {
  const Json expected = to_json(mine);
  for (const char* const name :
       {"protocol", "page_tokens", "weights", "page_format", "layer_bytes", "batch_invariant"}) {
    const Json& value = expected.at(name);
    const auto it = theirs.find(name);
    const std::string other = it == theirs.end() ? "nothing" : it->dump().substr(0, 200);
    if (it == theirs.end() || *it != value)
      throw TransferError(fmt::format("{} is {}, expected {}", name, other, value.dump().substr(0, 200)));
  }
}

std::string digest_of(std::span<const std::int32_t> tokens) {
  const XXH128_hash_t hash = XXH3_128bits(tokens.data(), tokens.size_bytes());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

PageLayout::PageLayout(const Identity& identity, std::int64_t num_pages)
    : num_pages_(num_pages), layer_bytes_(identity.layer_bytes), begins_{0} {
  for (const std::size_t bytes : layer_bytes_)
    begins_.push_back(begins_.back() + static_cast<std::size_t>(num_pages) * bytes);
}

std::vector<Piece> PageLayout::pieces(int layer, std::int64_t page, std::int64_t count) const {
  std::vector<Piece> out;
  for (int l = layer < 0 ? 0 : layer; l < (layer < 0 ? num_layers() : layer + 1); ++l) {
    const auto i = static_cast<std::size_t>(l);
    out.push_back({nullptr, begins_[i] + static_cast<std::size_t>(page) * layer_bytes_[i],
                   static_cast<std::size_t>(count) * layer_bytes_[i]});
  }
  return out;
}

std::uint64_t checksum(std::span<const Piece> pieces) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (const Piece& piece : pieces) XXH3_64bits_update(&state, piece.from, piece.bytes);
  return XXH3_64bits_digest(&state);
}

}  // namespace flash_mla::transfer
