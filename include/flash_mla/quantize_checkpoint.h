#pragma once

// Writing a checkpoint with weights of fewer bits. Needs no GPU.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace flash_mla {

struct QuantizeCheckpointOptions {
  enum class Format {
    kFp8,   ///< e4m3 with a scale for every 128 x 128 block, as DeepSeek publishes V3 (`quant_method: fp8`)
    kW4A8,  ///< 4 bits with a scale for every row and 128 columns (64 or 32 of narrow models), activations in FP8 (compressed-tensors,
            ///< `pack-quantized`); the CPU engine leaves activations as they are
  };
  Format format = Format::kFp8;
  /// FP8: scales are powers of two (`scale_fmt: ue8m0`).
  bool power_of_two_scales = false;
  /// Which weights: "attention", "dense" (feed-forward of the first layers), "shared" and "experts", "head". Empty:
  /// attention, shared and experts for kFp8; shared and experts for kW4A8. Never the embedding, norms and router.
  std::vector<std::string> layers;
  /// kW4A8: a text, by whose activations input features are scaled before they are rounded (AWQ, arXiv 2306.00978;
  /// folded into the norm or the product before). The model has to fit into memory for it. Empty: none.
  std::filesystem::path calibration;
  std::int64_t calibration_tokens = 8192;
  /// With a calibration: writes one scale for the activations of every product (`input_scale`), instead of leaving
  /// it to the engine to find one for every token.
  bool static_activations = false;
  std::uint64_t shard_bytes = std::uint64_t{4} << 30;  ///< of a file, but a tensor is never divided
  int num_threads = 0;  ///< of the calibration; 0 for as many as OpenMP would use
  /// Called after every tensor, with bytes of the input.
  std::function<void(double done, double total)> on_progress;
};

/// What quantisation did to the weights of one kind in one layer.
struct QuantizationError {
  std::string layers;  ///< such as "model.layers.3 experts"
  std::int64_t weights = 0;
  double relative = 0;  ///< root of the squared error over the squared weights
  /// The same of the products, with the calibration's input features taken as independent; 0 without one.
  double of_products = 0;
};

struct QuantizeCheckpointReport {
  double input_bytes = 0, output_bytes = 0;
  std::vector<QuantizationError> errors;
};

/// Reads the Hugging Face directory `model`, in any form that the engine reads, and writes the directory `out`, which
/// must not exist: tensor by tensor, config.json with the quantization_config, and all other files as they are. `out`
/// appears when it is whole. Throws InvalidArgument or Unsupported, naming what is wrong, and std::runtime_error if
/// something cannot be written.
QuantizeCheckpointReport quantize_checkpoint(const std::filesystem::path& model,
                                             const std::filesystem::path& out,
                                             const QuantizeCheckpointOptions& options);

}  // namespace flash_mla
