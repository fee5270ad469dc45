#pragma once

// What to measure: shapes, from a preset file or a preset built into the program.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bench/problem.h"

namespace flash_mla::bench {

/// A line of the benchmark: a shape, before any data exists.
struct Shape {
  std::string name;
  int b = 4;
  int s_q = 1;
  int h_q = 128;
  int h_kv = 1;
  int s_k = 4096;
  bool varlen = false;  ///< lengths as draw_lengths says; s_k is their mean
  bool causal = false;
  DType dtype = DType::kBFloat16;
  int page_size = 64;
  // What the time is compared with, where the preset says it.
  std::optional<double> best_ms{};
  std::optional<double> floor_ms{};
  std::map<std::string, double> peers_ms{};

  ProblemSpec problem(std::uint64_t seed) const;
};

/// The limits of `integer_between` and of preset values.
struct ShapeLimits {
  static constexpr int kMaxBatch = 65536, kMaxQueries = 64, kMaxHeads = 1024, kMaxKvHeads = 256;
  static constexpr int kMaxTokens = 4 << 20, kMaxPage = 256, kMaxThreads = 4096;
};

struct Preset {
  std::vector<Shape> shapes;
  std::vector<int> threads;  ///< empty: not said
  std::string device;        ///< "cpu" or "cuda": what its shapes are meant for; "": either
};

/// Reads a preset file (bench/presets/*.json has the format's examples), or the built-in preset of that name:
/// those files without their ".json". Throws InvalidArgument naming the file, the shape and the key.
Preset read_preset(const std::string& name_or_path);

/// "b4 h128 s4096 bf16": what a shape without a name is called.
std::string default_name(const Shape& shape);

/// Throws InvalidArgument when h_q is not a multiple of h_kv.
void check_shape(const Shape& shape);

}  // namespace flash_mla::bench
