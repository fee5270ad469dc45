#pragma once

#include <cstdint>

#include "flash_mla/decode.h"
#include "flash_mla/export.h"
#include "flash_mla/tensor.h"

namespace flash_mla {

/// What is done to single rows between attentions: norms, gates, rotations. Rows are float32, float16 or bfloat16, sums and
/// functions are computed in float32 and results rounded once. Tensors live on one device; last dimensions are contiguous,
/// other strides are free. Nothing is allocated and nothing synchronises; on a GPU the work is queued on options.stream and
/// may be captured. Throws InvalidArgument (message: argument, value, what was expected) or Unsupported.
struct RowOptions {
  int num_threads = 0;     ///< CPU: threads to run on; 0 means as many as OpenMP would use
  void* stream = nullptr;  ///< CUDA: the cudaStream_t to launch on
  Backend backend = Backend::kAuto;
};

struct RmsNormOptions {
  float eps = 1e-6f;
  float weight_offset = 0.0f;  ///< 1 for models whose weights are relative to 1 (Gemma)
  float out_scale = 1.0f;      ///< of an out of e4m3, positive: value = e4m3 * out_scale
};

/// out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset).
/// x, out: (n, d), one dtype; weight: (d), that dtype or float32. out may be x. An out of uint8 is e4m3: what
/// would be rounded to x's dtype is divided by norm.out_scale and rounded to the nearest e4m3, at most 448 in magnitude.
FLASH_MLA_API void rms_norm(const TensorView& x, const TensorView& weight, const TensorView& out,
                            const RmsNormOptions& norm = {}, const RowOptions& options = {});

/// residual += x, rounded to its dtype; out = rms_norm(residual), of what was rounded. x, residual, out: (n, d). out may be x,
/// not residual; an out of uint8 is e4m3 as rms_norm's.
FLASH_MLA_API void add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight,
                                const TensorView& out, const RmsNormOptions& norm = {},
                                const RowOptions& options = {});

/// kGelu by the error function, kGeluTanh by its approximation with tanh.
enum class Activation : std::uint8_t { kSilu, kGelu, kGeluTanh };

/// out = activation(gate) * up. gate_up: (n, 2 d), gate first; out: (n, d), its dtype.
FLASH_MLA_API void gated_activation(const TensorView& gate_up, const TensorView& out, Activation activation,
                                    const RowOptions& options = {});

/// How frequencies are stretched for positions beyond those that a model was trained with.
enum class RopeScaling : std::uint8_t {
  kNone,
  kLinear,  ///< all frequencies divided by `factor`
  /// Llama 3: frequencies of waves longer than original_max_position / low_freq_factor are divided by `factor`, those of waves
  /// shorter than original_max_position / high_freq_factor stay, and those between go over linearly.
  kLlama3,
  /// YaRN: between the pair that turns beta_fast times in original_max_position and the one that turns beta_slow times,
  /// frequencies go over from what they were to a `factor`-th; cosines and sines are multiplied by attention_factor.
  kYarn,
};

struct RopeOptions {
  /// true: pairs are neighbours (2i, 2i + 1), as in GPT-J and MLA. false: (i, i + rotary_dim / 2), as in GPT-NeoX and Llama.
  bool interleaved = false;
  int rotary_dim = 0;  ///< leading elements of a head that are turned, even; 0: all
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  std::int64_t original_max_position = 0;                ///< of kLlama3 and kYarn
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  ///< of kLlama3
  double beta_fast = 32.0, beta_slow = 1.0;              ///< of kYarn
  float attention_factor = 1.0f;                         ///< of kYarn; transformers': 0.1 * ln(factor) + 1
};

/// Turns the pairs of every head: pair i of a token at position p by the angle p * theta^(-2i / rotary_dim), scaled as options
/// say, or by the table's cosine and sine.
///
/// x, out: (n, heads, d), one dtype; out may be x. positions: (n) int32 | int64. cos_sin: (max_positions, rotary_dim) float32,
/// the cosines of a position's pairs, then their sines; not given (not defined): from `rope`, whose theta and scaling a table
/// replaces. Elements past rotary_dim are copied. On the host, positions outside the table throw; on a GPU they are the
/// caller's to get right. Angles are products in float32 of the position and a frequency that was computed in float64.
FLASH_MLA_API void apply_rope(const TensorView& x, const TensorView& positions, const TensorView& cos_sin,
                              const TensorView& out, const RopeOptions& rope = {},
                              const RowOptions& options = {});

/// The frequency of pair `pair`, before it is rounded to float32. For tables of one's own.
FLASH_MLA_API double rope_frequency(const RopeOptions& rope, int rotary_dim, int pair);

}  // namespace flash_mla
