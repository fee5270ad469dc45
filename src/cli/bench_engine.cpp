#include <memory>

#include "bench/engine_bench.h"
#include "cli/commands.h"
#include "flash_mla/engine.h"

namespace flash_mla::cli {

void register_bench_engine(CLI::App& app, int& exit_code) {
  auto o = std::make_shared<bench::EngineBenchOptions>();
  CLI::App* sub =
      app.add_subcommand("bench-engine",
                         "Measure decode steps, prefill and generation of a model with random weights on a "
                         "GPU or the CPU, beside the floor: "
                         "bytes of weights and cache that a step reads over the memory's bandwidth");
  sub->add_option("--config", o->config, "Folder with a config.json; default: the shape of DeepSeek-V2-Lite");
  sub->add_option("--batch", o->batch, "Sequences per step")->delimiter(',')->check(CLI::Range(1, 1024));
  sub->add_option("--context", o->context, "Cached tokens of each")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  sub->add_option("--prefill", o->prefill, "Prompt lengths")->delimiter(',')->check(CLI::Range(1, 1 << 20));
  sub->add_option("--steps", o->steps, "Decode steps of which the median is taken")
      ->check(CLI::Range(1, 10000));
  sub->add_option("--generate", o->generated, "Tokens that each request of the engine generates")
      ->check(CLI::Range(2, 100000));
  sub->add_option("--bandwidth", o->bandwidth, "Bytes per second of the floor")->check(CLI::PositiveNumber);
  sub->add_flag("--fp8-cache", o->fp8_cache,
                "A cache of 656 bytes per token and layer, for a model with an indexer");
  CLI::Option* fp8 = sub->add_flag("--fp8-weights", o->fp8_weights,
                                   "Weights of attention and experts in FP8, as --quantize fp8 makes them");
  sub->add_flag("--int4-weights", o->int4_weights, "Experts in 4 bits, as --quantize w4a8 makes them")
      ->excludes(fp8);
  sub->add_option(
         "--draft-tokens", o->draft_tokens,
         "Measure, in place of all else, steps that check so many drafts of a sequence, and generation with them")
      ->delimiter(',')
      ->check(CLI::Range(1, kMaxDraftTokens));
  sub->add_option(
         "--acceptance", o->acceptance,
         "Simulated chance that a draft is accepted if those before it were; random weights have none")
      ->check(CLI::Range(0.0, 1.0));
  sub->add_option_function<std::string>(
         "--device", [o](const std::string& name) { o->cpu = name == "cpu"; }, "cuda (the default) or cpu")
      ->check(CLI::IsMember({"cuda", "cpu"}));
  sub->add_option("--tp", o->tp, "Ranks that share the model")->check(CLI::Range(1, 1024));
  sub->add_option("--devices", o->devices,
                  "GPU of each rank of --tp, as in 0,0 for two streams of one (default: a GPU each)")
      ->delimiter(',');
  sub->add_option(
         "--dp", o->dp,
         "Ranks, or groups of --tp, that share the experts alone (CPU): generation by the engine is measured, and nothing else")
      ->check(CLI::Range(1, 1024));
  sub->add_option("--ep", o->ep,
                  "Parts that the experts are divided into, a divisor of --tp times --dp (0: that many)")
      ->check(CLI::Range(0, 1024));
  sub->add_option("--json", o->json, "Write the figures, with machine, command and commit, to this file");
  sub->callback([o, &exit_code] { exit_code = bench::run_engine_bench(*o); });
}

}  // namespace flash_mla::cli
