#include <limits>
#include <memory>

#include "bench/verify_cases.h"
#include "cli/args.h"
#include "cli/commands.h"

namespace flash_mla::cli {

void register_verify(CLI::App& app, int& exit_code) {
  auto options = std::make_shared<bench::VerifyOptions>();
  CLI::App* sub =
      app.add_subcommand("verify", "Random cases against the fp64 reference; exit code 1 when one disagrees");
  sub->add_option("--cases", options->cases, "How many cases to run")
      ->check(integer_between(1, 1'000'000'000))
      ->capture_default_str();
  sub->add_option("--seed", options->seed, "Seed of the cases")
      ->check(integer_between(0, std::numeric_limits<long long>::max()))
      ->capture_default_str();
  sub->add_option("--case", options->only_case, "Run this case of the seed alone, e.g. to repeat a failure")
      ->check(integer_between(0, 1'000'000'000));
  sub->add_flag("-v,--verbose", options->verbose, "Print every case");
  sub->add_flag("-q,--quiet", options->quiet, "No progress on stderr");
  sub->callback(
      [options, &exit_code] { exit_code = bench::run_verify(*options, bench::library_decode) == 0 ? 0 : 1; });
}

}  // namespace flash_mla::cli
