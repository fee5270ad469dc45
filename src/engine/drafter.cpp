#include "engine/drafter.h"

#include <algorithm>
#include <cstddef>

#include "engine/request.h"

namespace flash_mla::engine {
namespace {

// One token alone says little about what comes next; more than four add nothing to where the text goes on.
constexpr std::ptrdiff_t kShortest = 2, kLongest = 4;
// Tokens that are looked through: some ten microseconds.
constexpr std::ptrdiff_t kWindow = 32768;

}  // namespace

std::vector<std::int32_t> ngram_draft(std::span<const std::int32_t> tokens, int count) {
  const std::ptrdiff_t size = std::ssize(tokens);
  const auto at = [&](std::ptrdiff_t i) { return tokens[static_cast<std::size_t>(i)]; };
  std::ptrdiff_t best = kShortest - 1, end = -1;
  for (std::ptrdiff_t i = size - 2; i >= std::max<std::ptrdiff_t>(0, size - kWindow); --i) {
    if (at(i) != at(size - 1)) continue;
    std::ptrdiff_t same = 1;
    while (same < kLongest && same <= i && at(i - same) == at(size - 1 - same)) ++same;
    if (same <= best) continue;
    best = same;
    end = i;
    if (best == kLongest) break;
  }
  std::vector<std::int32_t> out;
  if (end < 0) return out;
  // What has occurred up to here may go on into itself: a text that repeats.
  for (std::ptrdiff_t i = end + 1; std::ssize(out) < count; ++i) {
    out.push_back(i < size ? at(i) : out[static_cast<std::size_t>(i - size)]);
  }
  return out;
}

std::vector<std::int32_t> NgramDrafter::draft(const Continuation& c, int count) {
  return ngram_draft(c.tokens, count);
}

}  // namespace flash_mla::engine
