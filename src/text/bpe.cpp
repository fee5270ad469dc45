#include "text/bpe.h"

#include <algorithm>
#include <queue>
#include <tuple>

namespace flash_mla::text {
namespace {

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 |
         static_cast<std::uint32_t>(right);
}

/// A token of the word so far; a list, since merging takes its right neighbour out.
struct Symbol {
  std::int32_t token;
  std::int32_t previous, next;  // indices, or -1
  bool alive;
};

/// A pair that could merge when it was queued.
struct Candidate {
  std::uint32_t rank;
  std::int32_t left;  // index of its first symbol
  std::int32_t token;

  /// Lowest rank first, then leftmost.
  bool operator>(const Candidate& other) const {
    return std::tie(rank, left) > std::tie(other.rank, other.left);
  }
};

}  // namespace

bool Bpe::has_every_byte() const {
  return std::find(byte_tokens_.begin(), byte_tokens_.end(), kNone) == byte_tokens_.end();
}

void Bpe::add_merge(std::int32_t left, std::int32_t right, std::int32_t merged) {
  merges_[pair_key(left, right)] = {next_rank_++, merged};
}

const Bpe::Merge* Bpe::find(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& out) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (const char c : word) {
    const std::int32_t token = byte_tokens_[static_cast<unsigned char>(c)];
    if (token == kNone) continue;
    const auto index = static_cast<std::int32_t>(symbols.size());
    if (index > 0) symbols.back().next = index;
    symbols.push_back({token, index - 1, -1, true});
  }

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto symbol = [&](std::int32_t index) -> Symbol& { return symbols[static_cast<std::size_t>(index)]; };
  const auto consider = [&](std::int32_t left) {
    if (left < 0 || symbol(left).next < 0) return;
    if (const Merge* merge = find(symbol(left).token, symbol(symbol(left).next).token)) {
      queue.push({merge->rank, left, merge->token});
    }
  };
  for (std::size_t i = 0; i < symbols.size(); ++i) consider(static_cast<std::int32_t>(i));

  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbol(best.left);
    if (!left.alive || left.next < 0) continue;
    Symbol& right = symbol(left.next);
    // The symbols may have changed since. (Another pair that gives the same token passes, as it does in the
    // reference implementation.)
    const Merge* merge = find(left.token, right.token);
    if (merge == nullptr || merge->token != best.token) continue;
    left.token = merge->token;
    right.alive = false;
    left.next = right.next;
    if (left.next >= 0) symbol(left.next).previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  for (const Symbol& s : symbols) {
    if (s.alive) out.push_back(s.token);
  }
}

}  // namespace flash_mla::text
