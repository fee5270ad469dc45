#include <memory>

#include "bench/load_test.h"
#include "cli/args.h"
#include "cli/commands.h"
#include "cli/engine_flags.h"

namespace flash_mla::cli {

void register_loadtest(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<bench::LoadTestOptions>();
  CLI::App* sub = app.add_subcommand("loadtest", "Put a mixed load on a running server and measure it");
  sub->add_option("--url", o->url, "The server")->capture_default_str();
  sub->add_option("--api-key", o->api_key, "Key to send");
  sub->add_option("--model", o->model, "Name of the model (default: the server's first)");
  sub->add_option("--requests", o->requests, "Requests in all")
      ->check(integer_between(1, 10'000'000))
      ->capture_default_str();
  auto* clients =
      sub->add_option("--clients", o->clients, "Closed loop: clients, each with one request at a time")
          ->check(integer_between(1, 20'000))
          ->capture_default_str();
  sub->add_option(
         "--rate", o->rate,
         "Open loop: requests per second at random times, however many are open (default: closed loop)")
      ->check(CLI::PositiveNumber)
      ->excludes(clients);
  sub->add_option("--short-tokens", o->short_tokens, "Tokens of a short prompt")
      ->check(integer_between(1, 10'000'000))
      ->capture_default_str();
  sub->add_option("--long-tokens", o->long_tokens, "Tokens of a long prompt")
      ->check(integer_between(1, 10'000'000))
      ->capture_default_str();
  sub->add_option("--long-share", o->long_share, "Share of long prompts")
      ->check(number_between(0, 1))
      ->capture_default_str();
  sub->add_option("--max-tokens", o->max_tokens, "Tokens generated per request")
      ->check(integer_between(1, 10'000'000))
      ->capture_default_str();
  sub->add_option("--timeout", o->timeout, "Seconds for one request")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  sub->add_option("--seed", o->seed, "Of prompts and times")->capture_default_str();
  sub->add_option("--min-success", o->min_success, "Exit code 1 if a smaller share of the requests succeeds")
      ->check(number_between(0, 1))
      ->capture_default_str();
  sub->add_option("--json", o->json_path, "File for the results");
  sub->add_option("--engine", o->engine_directory,
                  "Put the load on an engine in this process instead, with this model directory; the flags "
                  "below are its own")
      ->check(CLI::ExistingDirectory);
  add_engine_flags(*sub, o->engine);
  sub->callback([o, &exit_code] { exit_code = bench::run_load_test(*o); });
}

}  // namespace flash_mla::cli
