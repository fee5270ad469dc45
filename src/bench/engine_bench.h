#pragma once

#include <string>
#include <vector>

namespace flash_mla::bench {

struct EngineBenchOptions {
  std::string config;                     ///< folder with a config.json; empty: the shape of DeepSeek-V2-Lite
  std::string json;                       ///< file to write, or ""
  std::vector<int> batch{1, 8, 32, 128};  ///< sequences per step
  std::vector<int> context{1024, 8192};   ///< cached tokens of each
  std::vector<int> prefill{1024, 8192};   ///< prompt lengths
  int steps = 30;                         ///< decode steps of which the median is taken
  int generated = 64;                     ///< tokens per request of the engine
  double bandwidth = 4.65e12;             ///< bytes per second of the floor
  bool fp8_cache = false;                 ///< 656 bytes a token; models with an indexer
  bool fp8_weights = false;               ///< what --quantize fp8 makes of a checkpoint
  bool int4_weights = false;              ///< what --quantize w4a8 makes of one
  bool cpu = false;                       ///< on the CPU; times of the device are 0 then
  std::vector<int> devices;               ///< GPU of each rank of tp; empty: 0 to tp - 1
  int tp = 1, ep = 0;                     ///< ranks that share the model, its experts (0: tp, or dp)
  int dp = 1;                     ///< ranks that share the experts alone: generation alone is measured
  std::vector<int> draft_tokens;  ///< measured in place of all else: drafts of a sequence and step
  double acceptance = 0.8;        ///< simulated: of a draft whose predecessors were accepted
};

/// Measures decode steps, prefill and generation of a model with random weights and prints them
/// beside the floor. Returns the process's exit code.
int run_engine_bench(const EngineBenchOptions& options);

}  // namespace flash_mla::bench
