#include "bench/speculation_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>

#include "bench/borrowed_model.h"
#include "bench/table.h"
#include "bench/wall_time.h"
#include "engine/engine_core.h"

namespace flash_mla::bench {
namespace {

using Speculative = EngineOptions::Speculative;
using Ids = std::vector<std::int32_t>;

constexpr int kPrompt = 16;

// As the planner has it: the first token for certain, each draft while all before it were accepted.
double tokens_per_step(int drafts, double acceptance) {
  double tokens = 1, chance = 1;
  for (int i = 0; i < drafts; ++i) tokens += chance *= acceptance;
  return tokens;
}

/// Chooses the draft behind a token with a given chance, and some other token if not. All is computed as ever.
class SimulatedAcceptance : public BorrowedModel {
 public:
  SimulatedAcceptance(model::Model& model, double acceptance)
      : BorrowedModel(model), acceptance_(acceptance) {}

  void launch(const model::ForwardBatch& batch) override {
    BorrowedModel::launch(batch);
    Ids& drafts = drafts_.emplace_back();
    for (const auto& rows : {batch.drawn_rows, batch.greedy_rows}) {
      for (const std::int32_t row : rows) {
        const bool last = std::ranges::binary_search(batch.query_starts, row + 1);
        drafts.push_back(last ? -1 : batch.token_ids[static_cast<std::size_t>(row) + 1]);
      }
    }
  }
  void collect(float* logits, std::int32_t* tokens) override {
    const Ids drafts = std::move(drafts_.front());
    drafts_.pop_front();
    BorrowedModel::collect(logits, tokens);
    std::uniform_real_distribution<double> uniform;
    for (std::size_t i = 0; i < drafts.size(); ++i) {
      if (drafts[i] < 0) continue;
      tokens[i] = uniform(random_) < acceptance_ ? drafts[i] : (drafts[i] + 1) % vocab_size();
    }
  }

 private:
  double acceptance_;
  std::deque<Ids> drafts_;  // of each step on its way, behind each token that it chooses; -1: none
  std::mt19937 random_{3};
};

class SpeculationBench {
 public:
  SpeculationBench(model::Model& model, const SpeculationBenchOptions& options, int pages_per_sequence,
                   nlohmann::ordered_json& out)
      : model_(model), options_(options), pages_per_sequence_(pages_per_sequence), out_(out) {}

  void run() {
    checks();
    generation();
  }

 private:
  struct Times {
    double step = 0, module = 0;  // medians of the wall time, seconds
  };

  std::int32_t random_token() {
    return static_cast<std::int32_t>(random_() % static_cast<unsigned>(model_.vocab_size()));
  }

  // Steps of `batch` sequences with `drafts` drafts each, and if there are any the module behind each: over the tokens
  // that are accepted of them on average, for as many drafts.
  Times measure(int batch, int context, int drafts) {
    const int over =
        drafts == 0 ? 0
                    : std::clamp(static_cast<int>(std::lround(tokens_per_step(drafts, options_.acceptance))),
                                 1, drafts + 1);
    const int width = (context + drafts + kPageSize) / kPageSize + 1;
    Ids table, starts{0}, lengths, rows, module_starts{0}, module_lengths, states, num_drafts;
    for (int s = 0; s < batch; ++s) {
      for (int i = 0; i < width; ++i) table.push_back(s * pages_per_sequence_ + i);
      lengths.push_back(context + 1 + drafts);
      module_lengths.push_back(context + over);
      starts.push_back(starts.back() + 1 + drafts);
      module_starts.push_back(module_starts.back() + over);
      for (int i = 0; i < over; ++i) states.push_back(starts[static_cast<std::size_t>(s)] + i);
      num_drafts.push_back(drafts);
    }
    for (std::int32_t i = 0; i < starts.back(); ++i) rows.push_back(i);
    const std::vector<Draw> draws(static_cast<std::size_t>(batch * drafts));
    std::vector<double> step, module;
    for (int i = -5; i < options_.steps; ++i) {
      Ids tokens(rows.size()), next(states.size()), chosen(rows.size()), drafted(draws.size());
      std::ranges::generate(tokens, [&] { return random_token(); });
      std::ranges::generate(next, [&] { return random_token(); });
      model::ForwardBatch forward;
      forward.token_ids = tokens;
      forward.query_starts = starts;
      forward.seq_lens = lengths;
      forward.block_table = table;
      forward.max_blocks = width;
      forward.greedy_rows = rows;
      const Clock::time_point begin = Clock::now();
      model_.forward(forward, nullptr, chosen.data());
      const double of_step = seconds_since(begin);
      double of_module = 0;
      if (drafts > 0) {
        model::DraftBatch draft;
        draft.tokens = forward;
        draft.tokens.token_ids = next;
        draft.tokens.query_starts = module_starts;
        draft.tokens.seq_lens = module_lengths;
        draft.states = states;
        draft.num_drafts = num_drafts;
        draft.draws = draws;
        const Clock::time_point module_begin = Clock::now();
        model_.draft(draft, drafted.data());
        of_module = seconds_since(module_begin);
      }
      if (i < 0) continue;
      step.push_back(of_step);
      module.push_back(of_module);
    }
    return {upper_median(step), upper_median(module)};
  }

  void checks() {
    for (const int context : options_.context) {
      for (const int batch : options_.batch) {
        Table rows({"batch", "context", "drafts", "step ms", "x plain", "module ms", "x plain with it"});
        const double plain = measure(batch, context, 0).step;
        rows.add({fmt::format("{}", batch), fmt::format("{}", context), "0",
                  fmt::format("{:.3f}", plain * 1e3), "1.00", "-", "-"});
        for (const int drafts : options_.draft_tokens) {
          const auto [step, module] = measure(batch, context, drafts);
          rows.add({fmt::format("{}", batch), fmt::format("{}", context), fmt::format("{}", drafts),
                    fmt::format("{:.3f}", step * 1e3), fmt::format("{:.2f}", step / plain),
                    fmt::format("{:.3f}", module * 1e3), fmt::format("{:.2f}", (step + module) / plain)});
          out_["verification"].push_back({{"batch", batch},
                                          {"context", context},
                                          {"draft_tokens", drafts},
                                          {"plain_seconds", plain},
                                          {"step_seconds", step},
                                          {"module_seconds", module},
                                          {"times_plain", step / plain}});
        }
        print(rows);
      }
    }
  }

  // At once: a run takes a while.
  static void print(const Table& rows) {
    fmt::print("{}\n", rows.str());
    std::fflush(stdout);
  }

  struct Generated {
    double seconds = 0, tokens = 0;
    std::int64_t steps = 0;
    DraftStats drafts;
  };

  // `batch` requests, drawn at temperature 1, which makes random weights say something else every time.
  Generated generate(int batch, Speculative speculative, int drafts) {
    EngineOptions options;
    options.num_pages = batch * ((kPrompt + options_.generated + drafts) / kPageSize + 2);
    options.max_batch_size = batch;
    options.max_tokens_per_step = std::max(2048, batch * (drafts + 1));
    options.prefix_cache = false;
    options.speculative = speculative;
    options.draft_tokens = std::max(drafts, 1);
    engine::EngineCore core(std::make_unique<SimulatedAcceptance>(model_, options_.acceptance), {}, {},
                            options);
    Generated out;
    for (const bool warm : {false, true}) {
      int finished = 0;
      for (int i = 0; i < batch; ++i) {
        Request r;
        for (int t = 0; t < kPrompt; ++t) r.prompt_token_ids.push_back(random_token());
        r.sampling.temperature = 1;
        r.sampling.seed = random_();
        // What is recorded or allocated the first time is so in a short run before.
        r.sampling.max_tokens = warm ? options_.generated : std::min(options_.generated, 32);
        r.sampling.ignore_eos = true;
        core.submit(std::move(r), [&](const GenerationEvent& e) { finished += e.last; });
      }
      core.step();  // the prompts
      const EngineStats before = core.stats();
      const Clock::time_point begin = Clock::now();
      while (finished < batch && core.step()) {
      }
      if (!warm) continue;
      out.seconds = seconds_since(begin);
      out.steps = core.stats().steps - before.steps;
      out.tokens = double{1} * batch * (options_.generated - 1);
      out.drafts = core.stats().mtp_drafts;
      out.drafts.steps -= before.mtp_drafts.steps;
      out.drafts.drafted -= before.mtp_drafts.drafted;
      out.drafts.accepted -= before.mtp_drafts.accepted;
      out.drafts.tokens -= before.mtp_drafts.tokens;
    }
    return out;
  }

  void generation() {
    for (const int batch : options_.batch) {
      Table rows({"batch (engine)", "drafts", "speculative", "accepted", "tokens a step", "expected",
                  "step ms", "tokens/s", "x off"});
      const Generated off = generate(batch, Speculative::kOff, 0);
      add(rows, batch, 0, "off", off, off);
      for (const int drafts : options_.draft_tokens) {
        add(rows, batch, drafts, "mtp", generate(batch, Speculative::kMtp, drafts), off);
        add(rows, batch, drafts, "auto", generate(batch, Speculative::kAuto, drafts), off);
      }
      print(rows);
    }
  }

  void add(Table& rows, int batch, int drafts, const std::string& speculative, const Generated& g,
           const Generated& off) {
    const double rate = g.tokens / g.seconds, step = g.seconds / static_cast<double>(g.steps);
    const double expected = tokens_per_step(drafts, options_.acceptance);
    const double of_sequence = g.tokens / static_cast<double>(g.steps) / batch;
    rows.add({fmt::format("{}", batch), fmt::format("{}", drafts), speculative,
              fmt::format("{:.0f}%", 100 * g.drafts.acceptance()), fmt::format("{:.2f}", of_sequence),
              fmt::format("{:.2f}", expected), fmt::format("{:.3f}", step * 1e3), fmt::format("{:.0f}", rate),
              fmt::format("{:.2f}", rate / (off.tokens / off.seconds))});
    out_["speculation"].push_back({{"batch", batch},
                                   {"draft_tokens", drafts},
                                   {"speculative", speculative},
                                   {"acceptance_asked", options_.acceptance},
                                   {"drafted", g.drafts.drafted},
                                   {"accepted", g.drafts.accepted},
                                   {"tokens_per_step", of_sequence},
                                   {"tokens_per_step_with_drafts", g.drafts.tokens_per_step()},
                                   {"expected_tokens_per_step", expected},
                                   {"step_seconds", step},
                                   {"tokens_per_second", rate}});
  }

  model::Model& model_;
  const SpeculationBenchOptions& options_;
  int pages_per_sequence_;
  nlohmann::ordered_json& out_;
  std::mt19937 random_{13};
};

}  // namespace

void bench_speculation(model::Model& model, const SpeculationBenchOptions& options, int pages_per_sequence,
                       nlohmann::ordered_json& out) {
  SpeculationBench(model, options, pages_per_sequence, out).run();
}

}  // namespace flash_mla::bench
