#include "engine/token_chooser.h"

#include <algorithm>
#include <ctime>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace flash_mla::engine {
namespace {

int max_threads(int num_threads) {
#ifdef _OPENMP
  return num_threads > 0 ? num_threads : omp_get_max_threads();
#else
  static_cast<void>(num_threads);
  return 1;
#endif
}

std::size_t this_thread() {
#ifdef _OPENMP
  return static_cast<std::size_t>(omp_get_thread_num());
#else
  return 0;
#endif
}

// Where the token behind the `draft`-th draft comes from.
TokenChoice source(Continuation& c, std::size_t work, const StepBatch::Result& result, std::size_t draft,
                   StepPipeline& pipeline, std::size_t vocab_size) {
  TokenChoice choice;
  choice.continuation = &c;
  choice.work = work;
  if (result.is_token()) {
    choice.token = pipeline.tokens()[result.index + draft];
  } else {
    choice.logits = pipeline.logits().subspan((result.index + draft) * vocab_size, vocab_size);
  }
  return choice;
}

// Where each token comes from.
std::vector<TokenChoice> sources(const LaunchedStep& step, StepPipeline& pipeline, std::size_t vocab_size,
                                 Requests& requests) {
  std::vector<TokenChoice> choices;
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    const StepBatch::Result& result = step.results[i];
    if (c.ended || result.wanted == Wanted::kNothing) continue;
    TokenChoice choice = source(c, i, result, 0, pipeline, vocab_size);
    ActiveRequest& request = *c.request;
    if (request.forked || request.sampling.n == 1) {
      choices.push_back(choice);
      continue;
    }
    // The prompt is done: all continuations take their first token from here.
    requests.fork(request);
    choice.shared = true;
    for (const auto& each : request.continuations) {
      choice.continuation = each.get();
      choices.push_back(choice);
    }
  }
  return choices;
}

// Of the calling thread.
double cpu_seconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

}  // namespace

TokenChooser::TokenChooser(int num_threads) : samplers_(static_cast<std::size_t>(max_threads(num_threads))) {}

int TokenChooser::num_threads(std::ptrdiff_t items, std::ptrdiff_t logits) const {
  // Below some ten microseconds of work, waking threads costs more than they bring.
  constexpr std::ptrdiff_t kLogitsWorthThreads = 1 << 16;
  if (items < 2 || logits < kLogitsWorthThreads) return 1;
  return static_cast<int>(std::min(std::ssize(samplers_), items));
}

std::vector<std::pair<Continuation*, std::string>> TokenChooser::prepare(const LaunchedStep& step,
                                                                         int vocab_size) {
  std::vector<Continuation*> wanting;
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    const bool ruled = c.format || c.request->rules.needed(c.num_generated);
    if (ruled && !c.ended && step.plan.work[i].samples) wanting.push_back(&c);
  }
  return compute_masks(wanting, vocab_size);
}

std::vector<std::pair<Continuation*, std::string>> TokenChooser::compute_masks(
    const std::vector<Continuation*>& wanting, int vocab_size) const {
  // An ambiguous grammar can take ever longer; others of the step would have to wait for it.
  constexpr double kMaxSeconds = 0.5;
  const std::ptrdiff_t count = std::ssize(wanting);
  std::vector<double> seconds(wanting.size());
  const int threads = num_threads(count, count * vocab_size);
  static_cast<void>(threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const auto k = static_cast<std::size_t>(i);
    const double begin = cpu_seconds();
    wanting[k]->token_rule(static_cast<std::size_t>(vocab_size));
    seconds[k] = cpu_seconds() - begin;
  }
  std::vector<std::pair<Continuation*, std::string>> late;
  for (std::size_t k = 0; k < wanting.size(); ++k) {
    if (seconds[k] > kMaxSeconds) {
      late.emplace_back(wanting[k],
                        "the format of the text takes too long: its grammar is too large or too ambiguous");
    }
  }
  return late;
}

std::vector<std::pair<Continuation*, std::string>> TokenChooser::score(const LaunchedStep& step,
                                                                       StepPipeline& pipeline,
                                                                       int vocab_size) {
  std::vector<std::pair<Continuation*, std::string>> failed;
  const auto size = static_cast<std::size_t>(vocab_size);
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    const StepBatch::Result& result = step.results[i];
    Continuation& c = step.continuation(i);
    if (result.num_scored == 0 || c.ended) continue;
    ActiveRequest& request = *c.request;
    const std::size_t known = request.prompt_logprobs.size();
    request.prompt_logprobs.resize(known + static_cast<std::size_t>(result.num_scored));
    std::vector<std::string> errors(static_cast<std::size_t>(result.num_scored));
    const std::ptrdiff_t count = result.num_scored;
    const int threads = num_threads(count, count * vocab_size);
    static_cast<void>(threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
    for (std::ptrdiff_t k = 0; k < count; ++k) {
      const auto row = static_cast<std::size_t>(k), token = known + row;
      try {
        request.prompt_logprobs[token] = samplers_[this_thread()].score(
            pipeline.logits().subspan((result.first_scored + row) * size, size), request.prompt[token],
            request.sampling.prompt_logprobs);
      } catch (const std::exception& e) {
        errors[row] = e.what();
      }
    }
    const auto bad = std::ranges::find_if(errors, [](const std::string& e) { return !e.empty(); });
    if (bad != errors.end()) failed.emplace_back(&c, *bad);
    const bool all = request.prompt_logprobs.size() == request.prompt.size();
    c.score_from = static_cast<std::int64_t>(request.prompt_logprobs.size()) - 1;
    if (all) c.score_from.reset();
  }
  return failed;
}

std::vector<TokenChoice> TokenChooser::choose(const LaunchedStep& step, StepPipeline& pipeline,
                                              int vocab_size, Requests& requests) {
  std::vector<TokenChoice> choices = sources(step, pipeline, static_cast<std::size_t>(vocab_size), requests);
  sample(choices, pipeline);
  return choices;
}

std::vector<TokenChoice> TokenChooser::choose_behind(int draft, const LaunchedStep& step,
                                                     StepPipeline& pipeline, int vocab_size) {
  std::vector<TokenChoice> choices;
  std::vector<Continuation*> formatted;
  for (std::size_t i = 0; i < step.plan.work.size(); ++i) {
    Continuation& c = step.continuation(i);
    if (c.ended || step.drafts[i].committed < draft) continue;
    choices.push_back(source(c, i, step.results[i], static_cast<std::size_t>(draft), pipeline,
                             static_cast<std::size_t>(vocab_size)));
    if (c.format) formatted.push_back(&c);
  }
  for (const auto& [continuation, error] : compute_masks(formatted, vocab_size)) {
    std::ranges::find(choices, continuation, &TokenChoice::continuation)->error = error;
  }
  sample(choices, pipeline);
  return choices;
}

void TokenChooser::sample(std::vector<TokenChoice>& choices, StepPipeline& pipeline) {
  const std::ptrdiff_t count = std::ssize(choices);
  const int threads = num_threads(count, std::ssize(pipeline.logits()));
  static_cast<void>(threads);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    TokenChoice& choice = choices[static_cast<std::size_t>(i)];
    if (choice.error.empty()) sample(choice, samplers_[this_thread()]);
  }
}

void TokenChooser::sample(TokenChoice& choice, Sampler& sampler) {
  if (choice.logits.empty()) {
    choice.sampled.token = choice.token;
    if (choice.token < 0) {
      choice.error =
          "no token can be chosen: the model's logits hold NaN or infinity (weights or cache may be damaged), or what "
          "the request allows excludes every token";
    }
    return;
  }
  Continuation& c = *choice.continuation;
  try {
    std::vector<float> own;
    if (choice.shared) own.assign(choice.logits.begin(), choice.logits.end());
    const DrawKey key{c.request->seed, static_cast<std::uint32_t>(c.index),
                      static_cast<std::uint64_t>(c.num_generated)};
    const LogitEdit edit = [&](std::span<float> logits) {
      cpu::apply_rule(logits, c.token_rule(logits.size()));
    };
    choice.sampled = sampler.sample(c.request->sampling, c.history, key,
                                    choice.shared ? std::span<float>(own) : choice.logits, edit);
  } catch (const std::exception& e) {
    choice.error = e.what();
  }
}

}  // namespace flash_mla::engine
