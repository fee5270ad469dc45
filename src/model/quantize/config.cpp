#include "model/quantize/config.h"

#include "base/quantized.h"

namespace flash_mla::model {

Json quantization_config(const QuantizeCheckpointOptions& options, std::int64_t group,
                         const std::vector<std::string>& kept) {
  if (options.format == QuantizeCheckpointOptions::Format::kFp8) {
    Json out = {{"quant_method", "fp8"},
                {"fmt", "e4m3"},
                {"activation_scheme", "dynamic"},
                {"weight_block_size", {kFp8Block, kFp8Block}},
                {"modules_to_not_convert", kept}};
    if (options.power_of_two_scales) out["scale_fmt"] = "ue8m0";
    return out;
  }
  const Json weights = {{"num_bits", 4},
                        {"type", "int"},
                        {"symmetric", true},
                        {"strategy", "group"},
                        {"dynamic", false},
                        {"group_size", group},
                        {"actorder", nullptr},
                        {"observer", "mse"},
                        {"observer_kwargs", Json::object()},
                        {"block_structure", nullptr}};
  Json activations = {{"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"group_size", nullptr}};
  activations["dynamic"] = !options.static_activations;
  activations["strategy"] = options.static_activations ? "tensor" : "token";
  const Json products = {{"targets", {"Linear"}},
                         {"weights", weights},
                         {"input_activations", activations},
                         {"output_activations", nullptr}};
  return {{"quant_method", "compressed-tensors"}, {"format", "pack-quantized"},
          {"quantization_status", "compressed"},  {"ignore", kept},
          {"kv_cache_scheme", nullptr},           {"config_groups", {{"group_0", products}}}};
}

}  // namespace flash_mla::model
