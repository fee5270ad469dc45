#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "model/model.h"
#include "text/text_decoder.h"

namespace flash_mla::engine {

/// When the fake model runs what it is given.
enum class FakeRuns {
  kAtOnce,  ///< like a CPU
  kEarly,   ///< as if its launches were ahead, but as soon as it can
  kLate,    ///< as late as it can: nothing before somebody collects
  kEither,  ///< sometimes this, sometimes that
};

/// A model without weights. Its cache holds tokens; the logits after a sequence are a hash of all its tokens
/// as read back through the block table, so one wrong page, slot or copy changes the text.
class FakeModel : public model::Model {
 public:
  static constexpr int kVocabSize = 97;
  static constexpr std::int32_t kEos = 0;
  static constexpr std::int32_t kNaN = 95;    ///< a sequence with this token has NaN logits
  static constexpr std::int32_t kCrash = 96;  ///< a step with this token throws

  explicit FakeModel(std::int64_t max_position = 4096, FakeRuns runs = FakeRuns::kAtOnce)
      : max_position_(max_position), runs_(runs) {}

  int vocab_size() const override { return kVocabSize; }
  std::int64_t max_position() const override { return max_position_; }
  std::size_t bytes_per_page() const override { return kPageSize * sizeof(std::int32_t); }
  std::size_t free_memory() const override { return free_bytes; }
  ScheduleOptions schedule_options(int, bool) const override {
    if (refuses_to_plan_ahead && !flights_.empty()) throw std::bad_alloc();
    return cpu_schedule_options();
  }
  void allocate_cache(int num_pages) override {
    cache_.assign(static_cast<std::size_t>(num_pages) * kPageSize, -1);
    module_cache_ = cache_;
  }
  void copy_page(int source, int target) override {
    queue_.push_back([this, source, target] {
      for (Tokens* cache : {&cache_, &module_cache_}) {
        const auto page = [&](int p) { return cache->begin() + std::ptrdiff_t{p} * kPageSize; };
        std::copy_n(page(source), kPageSize, page(target));
      }
    });
    if (runs_now()) run_queue();
  }

  /// Where launches are ahead, a copy to the host is made as late as it can be: when somebody waits for it.
  std::unique_ptr<model::PageCopies> make_page_copies() override {
    struct Mark : model::CopyMark {
      explicit Mark(std::function<void()> work) : copy(std::move(work)) {}
      bool done() override { return is_done; }
      void wait() override {
        if (!is_done) copy();
        is_done = true;
      }
      std::function<void()> copy;
      std::atomic<bool> is_done = false;
    };
    struct Copies : model::PageCopies {
      explicit Copies(FakeModel& of) : fake(of) {}
      void follow_steps() override { fake.run_queue(); }
      void download(std::span<const std::int32_t> pages, std::byte* to) override {
        waiting.push_back([this, to, copied = Tokens(pages.begin(), pages.end())] {
          for (std::size_t i = 0; i < copied.size(); ++i) {
            std::memcpy(to + i * fake.bytes_per_page(), fake.page(copied[i]), fake.bytes_per_page());
          }
        });
      }
      void download(int, std::span<const std::int32_t> pages, std::byte* to) override { download(pages, to); }
      void upload(std::span<const std::int32_t> pages, const std::byte* from) override {
        for (std::size_t i = 0; i < pages.size(); ++i) {
          if (pages[i] < 0) continue;
          std::memcpy(fake.page(pages[i]), from + i * fake.bytes_per_page(), fake.bytes_per_page());
        }
      }
      std::unique_ptr<model::CopyMark> mark() override {
        auto out = std::make_unique<Mark>([work = std::exchange(waiting, {})] {
          for (const auto& copy : work) copy();
        });
        if (!fake.launches_ahead()) out->wait();
        return out;
      }
      FakeModel& fake;
      std::vector<std::function<void()>> waiting;
    };
    return std::make_unique<Copies>(*this);
  }

  void reserve(int, int) override {}

  bool launches_ahead() const override { return runs_ != FakeRuns::kAtOnce; }

  void launch(const model::ForwardBatch& batch) override {
    require(flights_.size() < 2 && (flights_.empty() || flights_.back()->logit_rows.empty()));
    const auto step = std::make_shared<Step>(batch);
    flights_.push_back(step);
    most_flights = std::max(most_flights, flights_.size());
    queue_.push_back([this, step] {
      try {
        run(*step);
      } catch (...) {
        step->error = std::current_exception();
      }
    });
    if (!runs_now()) return;
    run_queue();
    if (step->error && runs_ == FakeRuns::kAtOnce) {
      flights_.pop_back();
      std::rethrow_exception(step->error);
    }
  }

  bool draws_take_masks() const override { return takes_masks; }

  void choose(std::span<const TokenRule> rules) override {
    require(!flights_.empty() && flights_.back()->batch.masked && !flights_.back()->is_masked);
    const std::shared_ptr<Step> step = flights_.back();
    require(rules.size() == step->drawn_rows.size() + step->greedy_rows.size());
    step->is_masked = true;
    for (const TokenRule& rule : rules) {
      const std::uint32_t* mask = rule.allowed;
      step->masks.emplace_back(mask, mask == nullptr ? mask : mask + (kVocabSize + 31) / 32);
      step->biases.emplace_back(rule.biases.begin(), rule.biases.end());
    }
    queue_.push_back([this, step] { choose_tokens(*step); });
    if (runs_now()) run_queue();
  }

  void collect(float* logits, std::int32_t* tokens) override {
    require(!flights_.empty());
    const std::shared_ptr<Step> step = flights_.front();
    flights_.pop_front();
    require(step->is_masked == step->batch.masked);
    while ((!step->has_run || (step->is_masked && !step->has_chosen)) && !queue_.empty()) run_one();
    if (step->error) std::rethrow_exception(step->error);
    std::ranges::copy(step->logits, logits);
    std::ranges::copy(step->tokens, tokens);
  }

  bool has_draft_module() const override { return has_module; }

  /// Like a module, it wants every token that follows one of the last step, and has a cache of them. Some drafts are what
  /// a greedy sequence goes on with.
  void draft(const model::DraftBatch& batch, std::int32_t* tokens) override {
    require(has_module && flights_.empty() && batch.states.size() == batch.tokens.token_ids.size());
    run_queue();
    for (std::size_t s = 0; s < batch.num_drafts.size(); ++s) {
      const auto pages =
          batch.tokens.block_table.subspan(s * static_cast<std::size_t>(batch.tokens.max_blocks));
      const auto slot = [&](std::int32_t p) {
        return static_cast<std::size_t>(pages[static_cast<std::size_t>(p / kPageSize)]) * kPageSize +
               static_cast<std::size_t>(p % kPageSize);
      };
      const std::int32_t begin = batch.tokens.query_starts[s], end = batch.tokens.query_starts[s + 1];
      const std::int32_t length = batch.tokens.seq_lens[s];
      for (std::int32_t t = begin; t < end; ++t) {
        const std::int32_t position = length - (end - t);
        const auto state = static_cast<std::size_t>(batch.states[static_cast<std::size_t>(t)]);
        require(last_positions_.at(state) == position && last_ids_.at(state) == cache_.at(slot(position)));
        module_cache_.at(slot(position)) = batch.tokens.token_ids[static_cast<std::size_t>(t)];
      }
      for (std::int32_t p = 0; p + 1 < length; ++p) {
        // What follows a page's last token may have been another sequence's.
        const bool shared = p % kPageSize == kPageSize - 1;
        if (!shared && module_cache_.at(slot(p)) != cache_.at(slot(p + 1))) ++module_gaps;
      }
      Tokens sequence;
      for (std::int32_t p = 0; p < length; ++p) sequence.push_back(cache_.at(slot(p)));
      sequence.push_back(batch.tokens.token_ids[static_cast<std::size_t>(end) - 1]);
      for (std::int32_t i = 0; i < batch.num_drafts[s]; ++i) {
        require(pages[static_cast<std::size_t>((length + i - 1) / kPageSize)] >= 0);
        const bool lie = random_() % 4 == 0;
        *tokens = lie ? static_cast<std::int32_t>(random_() % 90) : likeliest_behind(sequence);
        sequence.push_back(*tokens++);
      }
    }
  }

  std::function<void(const model::ForwardBatch&)> on_forward;
  bool has_module = false;
  int module_gaps = 0;  ///< tokens of sequences that the module has not gone over
  std::size_t free_bytes = 0;
  bool takes_masks = false;
  bool refuses_to_plan_ahead = false;  ///< as if the host had no memory for it
  std::size_t most_flights = 0;        ///< that were on their way at a time

 private:
  using Tokens = std::vector<std::int32_t>;

  struct Step {
    explicit Step(const model::ForwardBatch& b)
        : token_ids(b.token_ids.begin(), b.token_ids.end()),
          query_starts(b.query_starts.begin(), b.query_starts.end()),
          seq_lens(b.seq_lens.begin(), b.seq_lens.end()),
          block_table(b.block_table.begin(), b.block_table.end()),
          logit_rows(b.logit_rows.begin(), b.logit_rows.end()),
          drawn_rows(b.drawn_rows.begin(), b.drawn_rows.end()),
          greedy_rows(b.greedy_rows.begin(), b.greedy_rows.end()),
          draws(b.draws.begin(), b.draws.end()),
          batch(b) {
      batch.token_ids = token_ids;
      batch.query_starts = query_starts;
      batch.seq_lens = seq_lens;
      batch.block_table = block_table;
      batch.logit_rows = logit_rows;
      batch.drawn_rows = drawn_rows;
      batch.greedy_rows = greedy_rows;
      batch.draws = draws;
    }
    Tokens token_ids, query_starts, seq_lens, block_table, logit_rows, drawn_rows, greedy_rows;
    std::vector<Draw> draws;
    model::ForwardBatch batch;  // of these
    std::vector<float> logits;
    Tokens tokens;
    std::vector<float> token_logits;                // of the rows of which a token is wanted
    std::vector<std::vector<std::uint32_t>> masks;  // empty: all tokens
    std::vector<std::vector<TokenBias>> biases;
    bool is_masked = false, has_run = false, has_chosen = false;
    std::exception_ptr error;
  };

  std::int32_t* page(std::int32_t index) { return &cache_.at(static_cast<std::size_t>(index) * kPageSize); }

  bool runs_now() {
    switch (runs_) {
      case FakeRuns::kLate:
        return false;
      case FakeRuns::kEither:
        return random_() % 2 == 0;
      default:
        return true;
    }
  }
  void run_one() {
    const std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    work();
  }
  void run_queue() {
    while (!queue_.empty()) run_one();
  }

  static std::int32_t likeliest_behind(const Tokens& sequence) {
    std::uint64_t hash = 1;
    for (const std::int32_t token : sequence) hash = mix(hash ^ static_cast<std::uint32_t>(token));
    float best = -1;
    std::int32_t token = 0;
    for (std::int32_t v = 0; v < kVocabSize; ++v) {
      hash = mix(hash);
      const float logit = static_cast<float>(hash >> 40) * 0x1p-22f;
      if (v == kNaN || v == kCrash || logit <= best) continue;
      best = logit;
      token = v;
    }
    return token;
  }

  void run(Step& step) {
    step.has_run = true;
    const model::ForwardBatch& batch = step.batch;
    for (std::int32_t& token : step.token_ids) {
      if (token < 0) token = std::max(last_tokens_.at(static_cast<std::size_t>(-1 - token)), 0);
    }
    last_tokens_.clear();
    const std::size_t num_seqs = batch.seq_lens.size();
    require(batch.query_starts.size() == num_seqs + 1 && batch.query_starts[0] == 0);
    require(batch.query_starts[num_seqs] == static_cast<std::int32_t>(batch.token_ids.size()));
    require(batch.block_table.size() == num_seqs * static_cast<std::size_t>(batch.max_blocks));
    require(batch.draws.size() == batch.drawn_rows.size());
    const auto slot = [&](std::size_t seq, std::int32_t position) -> std::int32_t& {
      const std::int32_t page = batch.block_table[seq * static_cast<std::size_t>(batch.max_blocks) +
                                                  static_cast<std::size_t>(position / kPageSize)];
      require(page >= 0);
      return cache_.at(static_cast<std::size_t>(page) * kPageSize +
                       static_cast<std::size_t>(position % kPageSize));
    };
    const auto first_position = [&](std::size_t seq) {
      return batch.seq_lens[seq] - (batch.query_starts[seq + 1] - batch.query_starts[seq]);
    };
    for (std::size_t s = 0; s < num_seqs; ++s) {
      require(batch.query_starts[s] < batch.query_starts[s + 1] && batch.seq_lens[s] <= max_position_);
      std::int32_t position = first_position(s);
      if (s == 0) {
        last_ids_ = step.token_ids;
        last_positions_.clear();
      }
      for (std::int32_t t = batch.query_starts[s]; t < batch.query_starts[s + 1]; ++t) {
        const std::int32_t token = batch.token_ids[static_cast<std::size_t>(t)];
        require(token >= 0 && token < kVocabSize);
        if (token == kCrash) throw std::runtime_error("the fake model met its crash token");
        last_positions_.push_back(position);
        slot(s, position++) = token;
      }
    }
    const auto logits_of = [&](std::int32_t row, float* out) {
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
    };
    step.logits.resize(batch.logit_rows.size() * kVocabSize);
    for (std::size_t i = 0; i < batch.logit_rows.size(); ++i) {
      logits_of(batch.logit_rows[i], step.logits.data() + i * kVocabSize);
    }
    for (const auto& rows : {batch.drawn_rows, batch.greedy_rows}) {
      for (const std::int32_t row : rows) {
        step.token_logits.resize(step.token_logits.size() + kVocabSize);
        logits_of(row, step.token_logits.data() + step.token_logits.size() - kVocabSize);
      }
    }
    if (!batch.masked) choose_tokens(step);
    if (on_forward) on_forward(batch);
  }

  void choose_tokens(Step& step) {
    step.has_chosen = true;
    if (step.error) return;
    const model::ForwardBatch& batch = step.batch;
    cpu::DrawScratch scratch;
    for (std::size_t i = 0; i < batch.drawn_rows.size() + batch.greedy_rows.size(); ++i) {
      const std::span own = std::span(step.token_logits).subspan(i * kVocabSize, kVocabSize);
      const bool good = std::ranges::none_of(own, [](float x) { return std::isnan(x); });
      if (step.is_masked) {
        cpu::apply_rule(own, {step.masks[i].empty() ? nullptr : step.masks[i].data(), step.biases[i]});
      }
      const auto best = std::ranges::max_element(own);
      step.tokens.push_back(!good || std::isinf(*best) ? -1
                            : i < batch.drawn_rows.size()
                                ? cpu::draw_token(own, *best, batch.draws[i], scratch)
                                : static_cast<std::int32_t>(best - own.begin()));
    }
    if (batch.logit_rows.empty()) last_tokens_ = step.tokens;
  }

  static std::uint64_t mix(std::uint64_t x) {
    x = (x + 0x9e3779b97f4a7c15u) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 29);
  }
  static void require(bool ok) {
    if (!ok) throw std::logic_error("malformed ForwardBatch");
  }

  std::int64_t max_position_;
  FakeRuns runs_;
  std::mt19937 random_{3};
  Tokens cache_;
  std::deque<std::function<void()>> queue_;
  std::deque<std::shared_ptr<Step>> flights_;
  Tokens last_tokens_;                // that the last step has chosen
  Tokens last_ids_, last_positions_;  // of its tokens
  Tokens module_cache_;               // of every slot, the token that follows
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
