#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/text_decoder.h"
#include "model/model.h"

namespace flash_mla::engine {

/// A model without weights. Its cache holds tokens; the logits after a sequence are a hash of all its tokens
/// as read back through the block table, so one wrong page, slot or copy changes the text.
class FakeModel : public model::Model {
 public:
  static constexpr int kVocabSize = 97;
  static constexpr std::int32_t kEos = 0;
  static constexpr std::int32_t kNaN = 95;    ///< a sequence with this token has NaN logits
  static constexpr std::int32_t kCrash = 96;  ///< a step with this token throws

  explicit FakeModel(std::int64_t max_position = 4096) : max_position_(max_position) {}

  int vocab_size() const override { return kVocabSize; }
  std::int64_t max_position() const override { return max_position_; }
  std::size_t bytes_per_page() const override { return model::kPageSize * sizeof(std::int32_t); }
  std::size_t free_memory() const override { return free_bytes; }
  ScheduleOptions schedule_options() const override { return cpu_schedule_options(); }
  void allocate_cache(int num_pages) override {
    cache_.assign(static_cast<std::size_t>(num_pages) * model::kPageSize, -1);
  }
  void copy_page(int source, int target) override {
    for (std::size_t i = 0; i < model::kPageSize; ++i) {
      cache_.at(static_cast<std::size_t>(target) * model::kPageSize + i) =
          cache_.at(static_cast<std::size_t>(source) * model::kPageSize + i);
    }
  }

  void reserve(int, int) override {}

  void forward(const model::ForwardBatch& batch, float* logits, std::int32_t* greedy) override {
    const std::size_t num_seqs = batch.seq_lens.size();
    require(batch.query_starts.size() == num_seqs + 1 && batch.query_starts[0] == 0);
    require(batch.query_starts[num_seqs] == static_cast<std::int32_t>(batch.token_ids.size()));
    require(batch.block_table.size() == num_seqs * static_cast<std::size_t>(batch.max_blocks));
    const auto slot = [&](std::size_t seq, std::int32_t position) -> std::int32_t& {
      const std::int32_t page = batch.block_table[seq * static_cast<std::size_t>(batch.max_blocks) +
                                                  static_cast<std::size_t>(position / model::kPageSize)];
      require(page >= 0);
      return cache_.at(static_cast<std::size_t>(page) * model::kPageSize +
                       static_cast<std::size_t>(position % model::kPageSize));
    };
    const auto first_position = [&](std::size_t seq) {
      return batch.seq_lens[seq] - (batch.query_starts[seq + 1] - batch.query_starts[seq]);
    };
    for (std::size_t s = 0; s < num_seqs; ++s) {
      require(batch.query_starts[s] < batch.query_starts[s + 1] && batch.seq_lens[s] <= max_position_);
      std::int32_t position = first_position(s);
      for (std::int32_t t = batch.query_starts[s]; t < batch.query_starts[s + 1]; ++t) {
        const std::int32_t token = batch.token_ids[static_cast<std::size_t>(t)];
        require(token >= 0 && token < kVocabSize);
        if (token == kCrash) throw std::runtime_error("the fake model met its crash token");
        slot(s, position++) = token;
      }
    }
    const std::size_t num_rows = batch.logit_rows.size() + batch.greedy_rows.size();
    std::vector<float> own(kVocabSize);
    for (std::size_t i = 0; i < num_rows; ++i) {
      const bool full = i < batch.logit_rows.size();
      const std::int32_t row = full ? batch.logit_rows[i] : batch.greedy_rows[i - batch.logit_rows.size()];
      float* out = full ? logits + i * kVocabSize : own.data();
      std::size_t s = 0;
      while (row >= batch.query_starts[s + 1]) ++s;
      std::uint64_t hash = 1;
      bool nan = false;
      const std::int32_t last = first_position(s) + row - batch.query_starts[s];
      for (std::int32_t p = 0; p <= last; ++p) {
        nan = nan || slot(s, p) == kNaN;
        hash = mix(hash ^ static_cast<std::uint32_t>(slot(s, p)));
      }
      for (std::size_t v = 0; v < kVocabSize; ++v) {
        hash = mix(hash);
        // The special tokens above are for prompts.
        const bool special = v == kNaN || v == kCrash;
        out[v] = nan       ? std::numeric_limits<float>::quiet_NaN()
                 : special ? -std::numeric_limits<float>::infinity()
                           : static_cast<float>(hash >> 40) * 0x1p-22f;
      }
      if (!full) {
        const auto best = std::max_element(own.begin(), own.end());
        greedy[i - batch.logit_rows.size()] = nan ? -1 : static_cast<std::int32_t>(best - own.begin());
      }
    }
    if (on_forward) on_forward(batch);
  }

  std::function<void(const model::ForwardBatch&)> on_forward;
  std::size_t free_bytes = 0;

 private:
  static std::uint64_t mix(std::uint64_t x) {
    x = (x + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 29);
  }
  static void require(bool ok) {
    if (!ok) throw std::logic_error("malformed ForwardBatch");
  }

  std::int64_t max_position_;
  std::vector<std::int32_t> cache_;
};

/// Tokens as letters; the end of sentence has none.
inline std::string fake_text(std::int32_t token) {
  return token == FakeModel::kEos ? "" : std::string(1, static_cast<char>('a' + token % 26));
}

class FakeDecoder : public TextDecoder {
 public:
  std::string push(std::int32_t token) override { return fake_text(token); }
  std::string flush() override { return {}; }
};

}  // namespace flash_mla::engine
