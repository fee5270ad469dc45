#pragma once

// Steps of a model in tests: sequences, batches of parts of them, and how far two results may be apart.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "model/model.h"

namespace flash_mla::model {

constexpr int kVocab = 160;

/// A sequence as the tests run it: its tokens, its pages, how many tokens are cached.
struct Sequence {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> pages;
};

inline std::vector<std::int32_t> random_tokens(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> out(static_cast<std::size_t>(count));
  for (std::int32_t& t : out) t = static_cast<std::int32_t>(random() % kVocab);
  return out;
}

/// New tokens [begin, end) of a sequence.
struct Part {
  const Sequence* sequence;
  int begin, end;
};

struct Result {
  std::vector<float> logits;         // of all new tokens, if not greedy
  std::vector<std::int32_t> greedy;  // of all new tokens, if greedy or drawn
};

/// `rules`: of all new tokens, which are then greedy or drawn; or none.
inline Result forward(Model& model, const std::vector<Part>& parts, bool greedy = false,
                      bool batch_invariant = false, const std::vector<Draw>& draws = {},
                      const std::vector<TokenRule>& rules = {}) {
  std::vector<std::int32_t> ids, starts{0}, lens, rows, table;
  std::size_t blocks = 0;
  for (const Part& p : parts) blocks = std::max(blocks, p.sequence->pages.size());
  for (const Part& p : parts) {
    for (int i = p.begin; i < p.end; ++i) {
      rows.push_back(static_cast<std::int32_t>(ids.size()));
      ids.push_back(p.sequence->tokens[static_cast<std::size_t>(i)]);
    }
    starts.push_back(static_cast<std::int32_t>(ids.size()));
    lens.push_back(p.end);
    table.insert(table.end(), p.sequence->pages.begin(), p.sequence->pages.end());
    table.resize(table.size() + blocks - p.sequence->pages.size(), -1);
  }
  ForwardBatch batch;
  batch.token_ids = ids;
  batch.query_starts = starts;
  batch.seq_lens = lens;
  batch.block_table = table;
  batch.max_blocks = static_cast<int>(blocks);
  (greedy ? batch.greedy_rows : draws.empty() ? batch.logit_rows : batch.drawn_rows) = rows;
  batch.draws = draws;
  batch.batch_invariant = batch_invariant;
  Result out;
  if (greedy || !draws.empty()) {
    out.greedy.assign(rows.size(), -7);
  } else {
    out.logits.assign(rows.size() * kVocab, std::nanf(""));
  }
  batch.masked = !rules.empty();
  model.launch(batch);
  if (batch.masked) model.choose(rules);
  model.collect(out.logits.data(), out.greedy.data());
  return out;
}

/// |a - b| / |b| of every row, sorted.
inline std::vector<double> row_errors(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  std::vector<double> out;
  for (std::size_t row = 0; row < a.size(); row += kVocab) {
    double difference = 0, size = 0;
    for (std::size_t i = row; i < row + kVocab; ++i) {
      difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
      size += double{b[i]} * b[i];
    }
    const double error = std::sqrt(difference / size);
    out.push_back(std::isfinite(error) ? error : 1e9);
  }
  std::sort(out.begin(), out.end());
  return out;
}

/// The greatest |a - b| / |b| of a row stays below `bound`: for models and contexts where rounding has nothing to choose.
inline void expect_all_close(const std::vector<float>& a, const std::vector<float>& b, const char* what,
                             double bound) {
  const std::vector<double> errors = row_errors(a, b);
  EXPECT_LT(errors.back(), bound) << what;
  if (std::getenv("FLASH_MLA_TEST_VERBOSE") != nullptr) {
    std::printf("%s: median error %.4f, worst %.4f\n", what, errors[errors.size() / 2], errors.back());
  }
}

// A row whose token takes other experts, because rounding decided, is far off: a tenth of the rows may be.
// The rest differs by the rounding of bfloat16, which a large routed_scaling_factor magnifies. `times` what
// such a row may be off, where other choices are made by rounding as well.
inline void expect_close(const std::vector<float>& a, const std::vector<float>& b, const char* what,
                         double times = 1) {
  const std::vector<double> errors = row_errors(a, b);
  const std::size_t far = std::min(errors.size() - 1, std::max<std::size_t>(errors.size() / 10, 1));
  const double median = errors[errors.size() / 2], most = errors[errors.size() - 1 - far];
  EXPECT_LT(median, 0.03 * times) << what;
  EXPECT_LT(most, 0.1 * times) << what;
  if (std::getenv("FLASH_MLA_TEST_VERBOSE") != nullptr) {
    std::printf("%s: median error %.4f, 90%% %.4f, worst %.4f\n", what, median, most, errors.back());
  }
}

/// From how many rows on products are made in FP8, for models that are loaded meanwhile; 0: never.
class Fp8Rows {
 public:
  explicit Fp8Rows(const char* rows) { setenv(kName, rows, 1); }
  ~Fp8Rows() { unsetenv(kName); }
  Fp8Rows(const Fp8Rows&) = delete;

 private:
  static constexpr const char* kName = "FLASH_MLA_FP8_ROWS";
};

}  // namespace flash_mla::model
