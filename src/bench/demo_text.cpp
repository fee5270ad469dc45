#include "bench/demo_text.h"

#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <vector>

#include "bench/generation_report.h"
#include "flash_mla/engine.h"

namespace flash_mla::bench {
namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point t) { return std::chrono::duration<double>(Clock::now() - t).count(); }

// A beginning in the manner of what the small model was trained on. Greedy choice would go round in circles.
Request demo_request() {
  Request request;
  request.prompt = "CHAPTER I\n\nEmma was";
  request.sampling.max_tokens = 120;
  request.sampling.temperature = 0.7;
  request.sampling.top_p = 0.95;
  request.sampling.seed = 1;
  request.sampling.ignore_eos = true;
  return request;
}

}  // namespace

bool demo_text(const std::filesystem::path& model_directory, const std::filesystem::path& file) {
  EngineOptions options;
  options.device = EngineOptions::Device::kCpu;
  const Clock::time_point loading = Clock::now();
  Engine engine(model_directory, options);
  const double load_seconds = since(loading);

  const std::vector<Request> requests{demo_request()};
  fmt::print("\nThe model in {} continues a text on the CPU.\n\n{}", model_directory.string(),
             requests[0].prompt);
  std::fflush(stdout);
  const Clock::time_point begin = Clock::now();
  const Completion::Choice choice = engine.generate(requests, print_text_of).at(0).choices.at(0);
  const double seconds = since(begin);
  fmt::print("\n\n{}\n", generation_summary(generation_report(engine, load_seconds, seconds)));

  std::ofstream out(file, std::ios::binary);
  out << requests[0].prompt << choice.text << '\n';
  out.close();
  if (!out) throw std::runtime_error(fmt::format("cannot write {}", file.string()));
  fmt::print("Wrote {}.\n", file.string());
  if (choice.finish == FinishReason::kError) fmt::print("The model failed: {}\n", choice.error);
  return choice.finish == FinishReason::kLength;
}

}  // namespace flash_mla::bench
