#pragma once

namespace flash_mla {

/// Where a model runs. kAuto: on a GPU if there is one that the library knows.
enum class ModelDevice { kAuto, kCpu, kCuda };

/// Of weights, activations between kernels and cache. kAuto: bfloat16 where the device multiplies it natively.
enum class ModelPrecision { kAuto, kFloat32, kBFloat16 };

/// kInt8: weights of the layers' products and of the LM head in 8 bits, one scale per output feature; CPU
/// only. Embedding, norms, router and kv_b keep the precision above, and so do activations and cache.
enum class ModelQuantize { kNone, kInt8 };

/// How far the loading of a model is.
struct LoadProgress {
  int layers = 0, total_layers = 0;
  double bytes = 0, total_bytes = 0;  ///< of weights, as the device holds them
};

}  // namespace flash_mla
