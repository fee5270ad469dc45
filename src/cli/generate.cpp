#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/json.h"
#include "bench/generation_report.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"
#include "cli/load_progress.h"
#include "flash_mla/engine.h"
#include "flash_mla/error.h"

// `flash-mla generate`: prompts in, text out as it comes, figures to stderr.

namespace flash_mla::cli {
namespace {

using Json = nlohmann::ordered_json;

struct GenerateOptions {
  std::string model, system, trace, variables;
  Talk talk;
  std::vector<std::string> prompts, files;
  bool chat = false, json = false, quiet = false;
  EngineOptions engine;
  SamplingParams sampling;
};

// Invalid UTF-8 (a prompt can be anything) must not break the output.
std::string dump(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace); }

// Those of --prompt, then those of files.
std::vector<std::string> prompts_of(const GenerateOptions& o) {
  std::vector<std::string> out;
  for (const std::string& prompt : o.prompts) {
    out.push_back(prompt == "-" ? std::string(std::istreambuf_iterator<char>(std::cin), {}) : prompt);
  }
  for (const std::string& file : o.files) out.push_back(read_file(file));
  return out;
}

std::vector<Request> make_requests(const GenerateOptions& o) {
  std::vector<Request> requests;
  for (const std::string& prompt : prompts_of(o)) {
    Request& r = requests.emplace_back();
    r.sampling = o.sampling;
    if (!o.chat) {
      r.prompt = prompt;
      continue;
    }
    if (!o.system.empty()) r.messages.push_back({"system", o.system});
    r.messages.push_back({"user", prompt});
    r.chat_variables = o.variables;
  }
  return requests;
}

Json to_json(const TokenLogprobs& l) {
  Json top = Json::array();
  for (const TokenLogprob& t : l.top) top.push_back({{"token", t.token}, {"logprob", t.logprob}});
  return {{"token", l.chosen.token}, {"logprob", l.chosen.logprob}, {"top", top}};
}

Json to_json(const Completion& c) {
  Json choices = Json::array();
  for (const Completion::Choice& choice : c.choices) {
    Json one = {{"text", choice.text},
                {"token_ids", choice.token_ids},
                {"finish_reason", finish_reason_name(choice.finish)}};
    if (!choice.error.empty()) one["error"] = choice.error;
    for (const TokenLogprobs& l : choice.logprobs) one["logprobs"].push_back(to_json(l));
    choices.push_back(one);
  }
  return {{"choices", choices},
          {"usage",
           {{"prompt_tokens", c.usage.prompt_tokens},
            {"cached_tokens", c.usage.cached_tokens},
            {"completion_tokens", c.usage.completion_tokens}}}};
}

void print_completions(const std::vector<Completion>& completions) {
  for (std::size_t i = 0; i < completions.size(); ++i) {
    for (std::size_t k = 0; k < completions[i].choices.size(); ++k) {
      fmt::print("--- prompt {}, continuation {}\n{}\n", i + 1, k + 1, completions[i].choices[k].text);
    }
  }
}

// Failed continuations, each named on stderr.
int count_failures(const std::vector<Completion>& completions) {
  int failures = 0;
  for (std::size_t i = 0; i < completions.size(); ++i) {
    for (const Completion::Choice& choice : completions[i].choices) {
      if (choice.finish != FinishReason::kError) continue;
      fmt::print(stderr, "flash-mla generate: prompt {}: {}\n", i + 1, choice.error);
      ++failures;
    }
  }
  return failures;
}

int run_generate(const CLI::App& app, GenerateOptions o) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point t) {
    return std::chrono::duration<double>(Clock::now() - t).count();
  };
  if (o.prompts.empty() && o.files.empty()) throw InvalidArgument("--prompt, --file: expected at least one");
  if (!o.system.empty() && !o.chat) throw InvalidArgument("--system: expected together with --chat");
  if (!o.variables.empty() && !o.chat) throw InvalidArgument("--chat-template-kwargs: expected with --chat");
  o.talk.quiet = o.quiet;
  show_loading(o.engine, o.talk, "flash-mla generate");
  const Clock::time_point loading = Clock::now();
  Engine engine(o.model, o.engine);
  const double load_seconds = since(loading);
  use_model_defaults(app, engine.default_sampling(), o.sampling);
  const std::vector<Request> requests = make_requests(o);

  const bool stream = !o.json && requests.size() == 1 && o.sampling.n == 1;
  EventHandler print_text;
  if (stream) print_text = bench::print_text_of;
  const Clock::time_point begin = Clock::now();
  const std::vector<Completion> completions = engine.generate(requests, print_text);
  const Json figures = bench::generation_report(engine, load_seconds, since(begin));

  if (o.json) {
    Json out = {{"model", o.model}, {"completions", Json::array()}, {"report", figures}};
    for (const Completion& c : completions) out["completions"].push_back(to_json(c));
    fmt::print("{}\n", dump(out));
  } else if (stream) {
    fmt::print("\n");
  } else {
    print_completions(completions);
  }
  if (!o.quiet) fmt::print(stderr, "{}\n", bench::generation_summary(figures));
  if (!o.trace.empty()) {
    std::ofstream file(o.trace, std::ios::binary);
    file << engine.chrome_trace();
    file.close();
    if (!file) throw InvalidArgument(fmt::format("--trace {}: cannot be written", o.trace));
  }
  return count_failures(completions) == 0 ? 0 : 1;
}

}  // namespace

void register_generate(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<GenerateOptions>();
  CLI::App* sub = app.add_subcommand("generate", "Continue prompts with a DeepSeek-V2 or V3 checkpoint");
  sub->add_option("-m,--model", o->model, "Hugging Face model directory")
      ->required()
      ->check(CLI::ExistingDirectory)
      ->envname("MODEL_PATH");
  sub->add_option("-p,--prompt", o->prompts,
                  "Text to continue, \"-\" for standard input; may be given several times")
      ->allow_extra_args(false);
  sub->add_option("-f,--file", o->files, "A file with a text to continue; may be given several times")
      ->allow_extra_args(false)
      ->check(CLI::ExistingFile);
  sub->add_flag("--chat", o->chat, "The prompt is a user's message: put it through the chat template");
  sub->add_option("--system", o->system, "With --chat: the system message");
  sub->add_option("--chat-template-kwargs", o->variables,
                  "With --chat: what the template is to see besides, as JSON: '{\"thinking\": true}'");
  add_sampling_flags(*sub, o->sampling);
  add_engine_flags(*sub, o->engine);
  sub->add_flag("--json", o->json, "Texts, token ids and figures as JSON");
  sub->add_flag("--quiet", o->quiet, "Neither figures nor the model's loading on stderr");
  add_talk_flags(*sub, o->talk);
  sub->add_option("--trace", o->trace, "Write the steps as a Chrome trace");
  sub->callback([o, sub, &exit_code] { exit_code = run_generate(*sub, *o); });
}

}  // namespace flash_mla::cli
