#include "checkpoint/quantization_config.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>

#include "flash_mla/error.h"

namespace flash_mla::checkpoint {
namespace {

constexpr std::int64_t kMaxSide = 1 << 24;

/// Refuses a field that might change what the weights mean.
void check_fields(const JsonObject& in, std::initializer_list<std::string_view> known) {
  for (const auto& [name, value] : in.json().items()) {
    if (!value.is_null() && std::find(known.begin(), known.end(), name) == known.end()) {
      in.refuse(name.c_str(), "no such field: what it does to the weights is not known");
    }
  }
}

void refuse_unless_empty(const JsonObject& in, const char* name) {
  const Json* value = in.find(name);
  if (value != nullptr && !value->empty()) in.refuse(name, "none");
}

StoredFormat read_fp8(const JsonObject& in) {
  check_fields(in, {"quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt",
                    "modules_to_not_convert", "ignored_layers", "dequantize"});
  if (in.string_or("fmt", "e4m3") != "e4m3") in.refuse("fmt", "\"e4m3\"");
  const std::string scheme = in.string_or("activation_scheme", "dynamic");
  if (scheme != "dynamic" && scheme != "static") in.refuse("activation_scheme", "\"dynamic\" or \"static\"");
  const std::string scales = in.string_or("scale_fmt", "float");
  if (scales != "float" && scales != "ue8m0") in.refuse("scale_fmt", "\"float\" or \"ue8m0\"");
  if (!in.has("weight_block_size")) in.refuse("weight_block_size", "[rows, columns] of a block");
  const Json& size = in.array("weight_block_size");
  const auto is_side = [](const Json& side) {
    return side.is_number_unsigned() && side.get<std::uint64_t>() >= 1 &&
           side.get<std::uint64_t>() <= kMaxSide;
  };
  if (size.size() != 2 || !is_side(size[0]) || !is_side(size[1])) {
    in.fail("weight_block_size", "two positive integers");
  }
  return {size[0].get<int>(), size[1].get<int>(), 0};
}

/// The group of weights that compressed-tensors describes.
int read_int4_group(const JsonObject& in) {
  check_fields(in, {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "observer",
                    "observer_kwargs", "actorder", "block_structure", "zp_dtype", "scale_dtype"});
  if (in.string_or("type", "int") != "int") in.refuse("type", "\"int\"");
  if (in.integer("num_bits", 1, 64) != 4) in.refuse("num_bits", "4");
  if (!in.boolean_or("symmetric", true)) in.refuse("symmetric", "true");
  const Json* dynamic = in.find("dynamic");
  if (dynamic != nullptr && *dynamic != false) in.refuse("dynamic", "false");
  // "weight" and "static" leave the columns as they are.
  const Json* order = in.find("actorder");
  if (order != nullptr && *order != false && *order != "weight" && *order != "static") {
    in.refuse("actorder", "null, \"weight\" or \"static\"");
  }
  const std::string strategy = in.string("strategy");
  if (strategy == "channel") return -1;
  if (strategy != "group") in.refuse("strategy", "\"group\" or \"channel\"");
  return static_cast<int>(in.integer("group_size", 1, kMaxSide));
}

/// Activations of 8 bits or none: they are not quantised here, which only takes rounding away.
void check_activations(const JsonObject& group) {
  if (!group.has("input_activations")) return;
  const JsonObject in = group.object("input_activations");
  if (in.integer("num_bits", 1, 64) != 8) in.refuse("num_bits", "8");
}

StoredFormat read_compressed_tensors(const JsonObject& in) {
  check_fields(
      in, {"quant_method", "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status",
           "global_compression_ratio", "sparsity_config", "transform_config", "version", "run_compressed"});
  if (in.string("format") != "pack-quantized") in.refuse("format", "\"pack-quantized\"");
  if (in.string_or("quantization_status", "compressed") != "compressed") {
    in.refuse("quantization_status", "\"compressed\"");
  }
  for (const char* name : {"kv_cache_scheme", "sparsity_config", "transform_config"}) {
    refuse_unless_empty(in, name);
  }
  const JsonObject groups = in.object("config_groups");
  if (groups.json().empty()) in.fail("config_groups", "a group of weights");
  StoredFormat out;
  for (const auto& [name, value] : groups.json().items()) {
    const JsonObject group = groups.object(name.c_str());
    check_fields(group, {"targets", "weights", "input_activations", "output_activations", "format"});
    if (group.string_or("format", "pack-quantized") != "pack-quantized") {
      group.refuse("format", "\"pack-quantized\"");
    }
    refuse_unless_empty(group, "output_activations");
    check_activations(group);
    const int size = read_int4_group(group.object("weights"));
    if (out.int4_group != 0 && out.int4_group != size) {
      in.refuse("config_groups", "groups of weights of one size");
    }
    out.int4_group = size;
  }
  return out;
}

}  // namespace

StoredFormat read_stored_format(const JsonObject& config) {
  if (!config.has("quantization_config")) return {};
  const JsonObject in = config.object("quantization_config");
  const std::string method = in.string("quant_method");
  if (method == "fp8") return read_fp8(in);
  if (method == "compressed-tensors") return read_compressed_tensors(in);
  in.refuse("quant_method", "\"fp8\" or \"compressed-tensors\"");
}

}  // namespace flash_mla::checkpoint
