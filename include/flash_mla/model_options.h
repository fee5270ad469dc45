#pragma once

#include <cstdint>

namespace flash_mla {

/// Where a model runs. kAuto: on a GPU if there is one that the library knows.
enum class ModelDevice { kAuto, kCpu, kCuda };

/// Of weights, activations between kernels and cache. kAuto: bfloat16 where the device multiplies it natively.
enum class ModelPrecision { kAuto, kFloat32, kBFloat16 };

/// Rows of the latent cache. kAuto: as precision says. kBFloat16, kFloat16: 2 bytes an element; float16 beside
/// float32 only. kFp8: 656 bytes a token (KvFormat::kFp8V32), and index keys of 132 (index_head_dim 128) or 68 (64)
/// where there is an indexer. What precision does not say by itself needs kv_lora_rank 512 and qk_rope_head_dim 64, and
/// the CPU, but that a GPU takes kFp8 where there is an indexer.
enum class ModelKvCache { kAuto, kBFloat16, kFloat16, kFp8 };

/// Of weights when they are loaded; activations, sums, norms and cache keep the precision above. On a GPU kNone and kFp8.
enum class ModelQuantize {
  /// As the checkpoint has them: FP8 and weights of 4 bits stay so.
  kNone,
  /// Products of all layers and of the LM head in 8 bits, one scale per output feature.
  kInt8,
  /// Attention, shared and routed experts in e4m3, one scale per 128 x 128 block, as DeepSeek publishes V3.
  kFp8,
  /// Shared and routed experts in 4 bits, one scale per output feature and 128 input features.
  kW4A8,
};

/// What one of several ranks that share a model has done so far.
struct RankStats {
  double seconds = 0;           ///< in steps
  std::int64_t exchanges = 0;   ///< with the other ranks
  std::int64_t bytes_sent = 0;  ///< in them, to others
  double exchange_seconds = 0;  ///< in them, the wait for others included
  double weight_bytes = 0;      ///< of its products, embedding and LM head
  // Of a rank with requests of its own (EngineOptions::dp), the first of its group with tp above 1; else 0.
  int running = 0, waiting = 0;                             ///< sequences now
  int pages_total = 0, pages_used = 0, pages_cached = 0;    ///< of its cache now, as in EngineStats
  std::int64_t computed_tokens = 0, prefix_tokens_hit = 0;  ///< of its sequences
  std::int64_t preemptions = 0;                             ///< of them
};

/// How far the loading of a model is.
struct LoadProgress {
  int layers = 0, total_layers = 0;
  double bytes = 0, total_bytes = 0;  ///< of weights, as the device holds them
};

}  // namespace flash_mla
