// The engine through the installed package: a model directory in, text out.

#include "flash_mla/engine.h"

#include <cstdio>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODEL_DIRECTORY\n", argv[0]);
    return 2;
  }
  flash_mla::Engine engine(argv[1]);
  flash_mla::SamplingParams params;
  params.max_tokens = 8;
  params.temperature = 0;
  const std::vector<std::string> prompts{"In the beginning"};
  const auto completions = engine.generate(prompts, params);
  if (completions.size() != 1 || completions[0].choices[0].text.empty()) return 1;
  std::printf("%s%s\n", prompts[0].c_str(), completions[0].choices[0].text.c_str());
  return 0;
}
