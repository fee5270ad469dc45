#include "model/device/cuda/rule_upload.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace flash_mla::model {
namespace {

std::size_t words_of(std::int64_t vocab_size) { return static_cast<std::size_t>((vocab_size + 31) / 32); }

}  // namespace

void RuleUploader::reserve(std::int64_t rows, std::int64_t vocab_size, DevicePool& pool) {
  constexpr std::size_t kBesideMasks = std::size_t{1} << 16;  // rows and a bias here and there
  upload_.reserve(
      static_cast<std::size_t>(rows) * words_of(vocab_size) * sizeof(std::uint32_t) + kBesideMasks, pool);
}

sm90::TokenRules RuleUploader::upload(std::int64_t first, std::span<const TokenRule> rules,
                                      std::int64_t vocab_size, DevicePool& pool, cudaStream_t stream) {
  const std::size_t words = words_of(vocab_size);
  std::vector<sm90::RuledRow> rows;
  std::vector<const std::uint32_t*> masks;
  std::vector<TokenBias> biases;
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const TokenRule& rule = rules[i];
    if (rule.changes_nothing()) continue;
    sm90::RuledRow& row = rows.emplace_back();
    row.row = static_cast<std::int32_t>(first + static_cast<std::int64_t>(i));
    if (rule.allowed != nullptr) {
      row.mask = static_cast<std::int32_t>(masks.size());
      masks.push_back(rule.allowed);
    }
    row.first_bias = static_cast<std::int32_t>(biases.size());
    row.num_biases = static_cast<std::int32_t>(rule.biases.size());
    biases.insert(biases.end(), rule.biases.begin(), rule.biases.end());
  }
  sm90::TokenRules out;
  out.num_rows = std::ssize(rows);
  if (rows.empty()) return out;
  upload_.send(pool, stream, [&](Packer& packer) {
    out.rows = packer.place(rows);
    out.biases = packer.place(biases);
    out.masks = packer.place<std::uint32_t>(masks.size() * words, [&](std::uint32_t* to) {
      for (const std::uint32_t* mask : masks) to = std::copy_n(mask, words, to);
    });
  });
  return out;
}

}  // namespace flash_mla::model
