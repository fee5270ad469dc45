#include "bench/load_test.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "bench/load_client.h"
#include "bench/load_engine.h"
#include "bench/machine.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::ordered_json;

enum Class { kShort, kLong };

// Random words would be tokenized to unknown lengths: prompts are tokens, drawn from those of all words of
// two letters, which are enough to reach all experts of a model.
std::string two_letter_words() {
  std::string text;
  for (char a = 'a'; a <= 'z'; ++a) {
    for (char b = 'a'; b <= 'z'; ++b) text += {' ', a, b};
  }
  return text;
}

std::vector<std::int32_t> alphabet(std::vector<std::int32_t> tokens) {
  if (tokens.size() < 2) throw std::runtime_error("the tokenizer makes less than two tokens of a text");
  tokens.erase(tokens.begin());  // may be the begin-of-sentence token
  std::ranges::sort(tokens);
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  return tokens;
}

std::vector<LoadRequest> make_load(const LoadTestOptions& o, const std::vector<std::int32_t>& tokens) {
  std::mt19937_64 random(o.seed);
  std::uniform_int_distribution<std::size_t> token(0, tokens.size() - 1);
  std::exponential_distribution<double> gap(o.rate > 0 ? o.rate : 1);
  std::vector<LoadRequest> out(static_cast<std::size_t>(o.requests));
  const auto num_long = static_cast<std::size_t>(std::lround(o.long_share * o.requests));
  for (std::size_t i = 0; i < num_long; ++i) out[i].load_class = kLong;
  std::shuffle(out.begin(), out.end(), random);
  double due = 0;
  for (LoadRequest& r : out) {
    r.prompt.resize(static_cast<std::size_t>(r.load_class == kLong ? o.long_tokens : o.short_tokens));
    for (std::int32_t& id : r.prompt) id = tokens[token(random)];
    r.max_tokens = o.max_tokens;
    r.due = due;
    if (o.rate > 0) due += gap(random);
  }
  return out;
}

// Linear between the two nearest ranks; null for no values.
Json quantile(std::vector<double> values, double q) {
  if (values.empty()) return nullptr;
  std::ranges::sort(values);
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const std::size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (values[high] - values[low]) * (at - static_cast<double>(low));
}

Json latencies(const std::vector<double>& values) {
  return {{"p50", quantile(values, 0.5)}, {"p99", quantile(values, 0.99)}};
}

template <typename Wanted>
Json summary(const std::vector<LoadRequest>& requests, double seconds, const Wanted& wanted) {
  std::vector<double> ttft, tpot, e2e;
  std::int64_t sent = 0, prompt_tokens = 0, completion_tokens = 0;
  for (const LoadRequest& r : requests) {
    if (!wanted(r)) continue;
    ++sent;
    if (!r.error.empty()) continue;
    ttft.push_back(r.first - r.begin);
    e2e.push_back(r.end - r.begin);
    if (r.completion_tokens > 1) {
      tpot.push_back((r.last - r.first) / static_cast<double>(r.completion_tokens - 1));
    }
    prompt_tokens += r.prompt_tokens;
    completion_tokens += r.completion_tokens;
  }
  const auto good = static_cast<double>(e2e.size());
  return {{"requests", sent},
          {"succeeded", e2e.size()},
          {"success_rate", sent == 0 ? Json() : Json(good / static_cast<double>(sent))},
          {"requests_per_second", good / seconds},
          {"prompt_tokens_per_second", static_cast<double>(prompt_tokens) / seconds},
          {"completion_tokens_per_second", static_cast<double>(completion_tokens) / seconds},
          {"ttft_seconds", latencies(ttft)},
          {"tpot_seconds", latencies(tpot)},
          {"e2e_seconds", latencies(e2e)}};
}

Json report(const LoadTestOptions& o, const std::string& model, const std::vector<LoadRequest>& requests,
            double seconds) {
  std::map<std::string, int> errors;
  for (const LoadRequest& r : requests) {
    if (!r.error.empty()) ++errors[fmt::format("{} {}", r.status, r.error)];
  }
  const auto of_class = [](int c) { return [c](const LoadRequest& r) { return r.load_class == c; }; };
  Json out = {{"command", command_line()},
              {"model", model},
              {"target", o.engine_directory.empty() ? "server" : "engine in this process"},
              {"loop", o.rate > 0 ? "open" : "closed"},
              {"clients", o.rate > 0 ? Json() : Json(o.clients)},
              {"rate", o.rate > 0 ? Json(o.rate) : Json()},
              {"short_tokens", o.short_tokens},
              {"long_tokens", o.long_tokens},
              {"max_tokens", o.max_tokens},
              {"seed", o.seed},
              {"seconds", seconds},
              {"all", summary(requests, seconds, [](const LoadRequest&) { return true; })},
              {"short", summary(requests, seconds, of_class(kShort))},
              {"long", summary(requests, seconds, of_class(kLong))},
              {"errors", errors}};
  return out;
}

// On a terminal one line that is drawn again, else a line for every tenth.
class Progress {
 public:
  explicit Progress(std::size_t total) : total_(total), terminal_(isatty(STDERR_FILENO) == 1) {}
  void operator()(std::size_t done) {
    if (terminal_) {
      constexpr std::size_t kWidth = 40;
      const std::size_t filled = done * kWidth / total_;
      fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {}/{}{}", "", filled, "", kWidth - filled, done, total_,
                 done == total_ ? "\n" : "");
    } else if (done * 10 / total_ != shown_) {
      shown_ = done * 10 / total_;
      fmt::print(stderr, "{}/{} requests\n", done, total_);
    }
  }

 private:
  std::size_t total_, shown_ = 0;
  bool terminal_;
};

std::string milliseconds(const Json& seconds) {
  return seconds.is_null() ? "-" : fmt::format("{:.1f}", seconds.get<double>() * 1e3);
}

void print(const Json& r) {
  fmt::print(
      "{:<8}{:>10}{:>10}{:>14}{:>10}{:>10}{:>10}{:>10}\n{:<8}{:>10}{:>10}{:>14}{:>10}{:>10}{:>10}{:>10}\n",
      "", "requests", "success", "generated", "TTFT P50", "TTFT P99", "TPOT P50", "TPOT P99", "", "", "%",
      "tokens/s", "ms", "ms", "ms", "ms");
  for (const char* name : {"all", "short", "long"}) {
    const Json& s = r[name];
    fmt::print(
        "{:<8}{:>10}{:>10}{:>14.1f}{:>10}{:>10}{:>10}{:>10}\n", name, s["requests"].get<int>(),
        s["success_rate"].is_null() ? "-" : fmt::format("{:.2f}", s["success_rate"].get<double>() * 100),
        s["completion_tokens_per_second"].get<double>(), milliseconds(s["ttft_seconds"]["p50"]),
        milliseconds(s["ttft_seconds"]["p99"]), milliseconds(s["tpot_seconds"]["p50"]),
        milliseconds(s["tpot_seconds"]["p99"]));
  }
  for (const auto& [error, count] : r["errors"].items())
    fmt::print("{} times: {}\n", count.get<int>(), error);
}

// Sends the load to a server; returns the model's name, the requests and the seconds that it took.
struct Outcome {
  std::string model;
  std::vector<LoadRequest> requests;
  double seconds = 0;
};

Outcome load_server(const LoadTestOptions& o) {
  LoadOptions options;
  options.target = parse_target(o.url);
  options.target.api_key = o.api_key;
  options.clients = o.clients;
  options.open_loop = o.rate > 0;
  options.timeout_seconds = o.timeout;
  Outcome out;
  out.model = o.model;
  if (out.model.empty()) {
    out.model = call_server(options.target, "/v1/models").at("data").at(0).at("id").get<std::string>();
  }
  const auto tokens =
      call_server(options.target, "/v1/tokenize", Json{{"prompt", two_letter_words()}}.dump()).at("tokens");
  out.requests = make_load(o, alphabet(tokens.get<std::vector<std::int32_t>>()));
  options.model = out.model;
  Progress progress(out.requests.size());
  out.seconds = run_load(options, out.requests, [&](std::size_t done) { progress(done); });
  return out;
}

Outcome load_engine(const LoadTestOptions& o) {
  Outcome out;
  out.model = o.model.empty() ? "engine" : o.model;
  Engine engine(o.engine_directory, o.engine);
  engine.start();
  out.requests = make_load(o, alphabet(engine.tokenize(two_letter_words())));
  Progress progress(out.requests.size());
  out.seconds =
      run_load_in_process(engine, o.clients, out.requests, [&](std::size_t done) { progress(done); });
  return out;
}

}  // namespace

int run_load_test(const LoadTestOptions& o) {
  if (!o.engine_directory.empty() && o.rate > 0)
    throw InvalidArgument("--rate: expected with a server, not --engine");
  const auto [model, requests, seconds] = o.engine_directory.empty() ? load_server(o) : load_engine(o);
  const Json result = report(o, model, requests, seconds);
  print(result);
  if (!o.json_path.empty()) {
    std::ofstream file(o.json_path);
    file << result.dump(2, ' ', false, Json::error_handler_t::replace) << "\n";
    if (!file.flush()) throw std::runtime_error(fmt::format("{} cannot be written", o.json_path));
  }
  return result["all"]["success_rate"].get<double>() >= o.min_success ? 0 : 1;
}

}  // namespace flash_mla::bench
