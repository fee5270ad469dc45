#include "bench/preset.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "bench/dtype.h"
#include "flash_mla/error.h"
#include "flash_mla_presets.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::json;

// Fetches `key` of a preset's shape into `value`, which keeps its default when there is none.
void take_integer(const Json& shape, const char* key, int lowest, int highest, const std::string& where,
                  int& value) {
  const auto found = shape.find(key);
  if (found == shape.end()) return;
  if (!found->is_number_integer() || found->get<std::int64_t>() < lowest ||
      found->get<std::int64_t>() > highest) {
    throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected an integer from {} to {}", where, key,
                                      found->dump(), lowest, highest));
  }
  value = found->get<int>();
}

void take_bool(const Json& shape, const char* key, const std::string& where, bool& value) {
  const auto found = shape.find(key);
  if (found == shape.end()) return;
  if (!found->is_boolean()) {
    throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected true or false", where, key, found->dump()));
  }
  value = found->get<bool>();
}

double positive_number(const Json& value, const std::string& key, const std::string& where) {
  if (!value.is_number() || !(value.get<double>() > 0)) {
    throw InvalidArgument(
        fmt::format("{}: \"{}\" is {}, expected a positive number", where, key, value.dump()));
  }
  return value.get<double>();
}

void take_number(const Json& shape, const char* key, const std::string& where, std::optional<double>& value) {
  const auto found = shape.find(key);
  if (found != shape.end()) value = positive_number(*found, key, where);
}

// {"a peer": milliseconds, ...}
void take_peers(const Json& shape, const std::string& where, std::map<std::string, double>& peers) {
  const auto found = shape.find("peers_ms");
  if (found == shape.end()) return;
  if (!found->is_object()) {
    throw InvalidArgument(
        fmt::format("{}: \"peers_ms\" is {}, expected an object of milliseconds", where, found->dump()));
  }
  for (const auto& [name, ms] : found->items()) {
    peers[name] = positive_number(ms, "peers_ms." + name, where);
  }
}

void refuse_unknown_keys(const Json& object, std::initializer_list<const char*> known,
                         const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) == known.end()) {
      throw InvalidArgument(
          fmt::format("{}: unknown key \"{}\", expected one of: {}", where, key, fmt::join(known, ", ")));
    }
  }
}

Shape read_shape(const Json& json, std::string where) {
  if (!json.is_object())
    throw InvalidArgument(fmt::format("{} is {}, expected an object", where, json.dump()));
  refuse_unknown_keys(json,
                      {"name", "b", "s_q", "h_q", "h_kv", "s_k", "varlen", "causal", "dtype", "page_size",
                       "best_ms", "floor_ms", "peers_ms"},
                      where);
  Shape s;
  using L = ShapeLimits;
  take_integer(json, "b", 1, L::kMaxBatch, where, s.b);
  take_integer(json, "s_q", 1, L::kMaxQueries, where, s.s_q);
  take_integer(json, "h_q", 1, L::kMaxHeads, where, s.h_q);
  take_integer(json, "h_kv", 1, L::kMaxKvHeads, where, s.h_kv);
  take_integer(json, "s_k", 1, L::kMaxTokens, where, s.s_k);
  take_integer(json, "page_size", 1, L::kMaxPage, where, s.page_size);
  take_bool(json, "varlen", where, s.varlen);
  take_bool(json, "causal", where, s.causal);
  take_number(json, "best_ms", where, s.best_ms);
  take_number(json, "floor_ms", where, s.floor_ms);
  take_peers(json, where, s.peers_ms);
  for (const char* key : {"name", "dtype"}) {
    const auto found = json.find(key);
    if (found == json.end()) continue;
    if (!found->is_string()) {
      throw InvalidArgument(fmt::format("{}: \"{}\" is {}, expected a string", where, key, found->dump()));
    }
    try {
      if (std::strcmp(key, "dtype") == 0) s.dtype = parse_dtype(found->get<std::string>());
    } catch (const InvalidArgument& e) {
      throw InvalidArgument(fmt::format("{}: {}", where, e.what()));
    }
    if (std::strcmp(key, "name") == 0) s.name = found->get<std::string>();
  }
  return s;
}

Preset parse_preset(std::string_view text, const std::string& where) {
  Json json;
  try {
    json = Json::parse(text);
  } catch (const Json::parse_error& e) {
    throw InvalidArgument(fmt::format("{} is not JSON: {}", where, e.what()));
  }
  if (!json.is_object() || !json.contains("shapes") || !json["shapes"].is_array() || json["shapes"].empty()) {
    throw InvalidArgument(fmt::format("{}: expected an object with a non-empty array \"shapes\"", where));
  }
  refuse_unknown_keys(json, {"description", "device", "threads", "shapes"}, where);
  Preset preset;
  for (std::size_t i = 0; i < json["shapes"].size(); ++i) {
    preset.shapes.push_back(read_shape(json["shapes"][i], fmt::format("{}, shapes[{}]", where, i)));
    try {
      check_shape(preset.shapes.back());
    } catch (const InvalidArgument& e) {
      throw InvalidArgument(fmt::format("{}, shapes[{}]: {}", where, i, e.what()));
    }
  }
  if (json.contains("threads")) {
    const Json& threads = json["threads"];
    const auto good = [](const Json& t) {
      return t.is_number_integer() && t.get<std::int64_t>() >= 1 &&
             t.get<std::int64_t>() <= ShapeLimits::kMaxThreads;
    };
    if (!threads.is_array() || threads.empty() || !std::all_of(threads.begin(), threads.end(), good)) {
      throw InvalidArgument(fmt::format("{}: \"threads\" is {}, expected an array of integers from 1 to {}",
                                        where, threads.dump(), ShapeLimits::kMaxThreads));
    }
    preset.threads = threads.get<std::vector<int>>();
  }
  if (json.contains("device")) {
    const Json& device = json["device"];
    if (device != "cpu" && device != "cuda") {
      throw InvalidArgument(
          fmt::format("{}: \"device\" is {}, expected \"cpu\" or \"cuda\"", where, device.dump()));
    }
    preset.device = device.get<std::string>();
  }
  return preset;
}

}  // namespace

ProblemSpec Shape::problem(std::uint64_t seed) const {
  ProblemSpec spec;
  spec.cache_seqlens = draw_lengths(b, s_k, varlen, seed);
  spec.s_q = s_q;
  spec.h_q = h_q;
  spec.h_kv = h_kv;
  spec.dtype = dtype;
  spec.causal = causal;
  spec.page_size = page_size;
  spec.seed = seed;
  return spec;
}

void check_shape(const Shape& shape) {
  if (shape.h_q % shape.h_kv != 0) {
    throw InvalidArgument(fmt::format("h_q is {}, expected a multiple of h_kv = {}", shape.h_q, shape.h_kv));
  }
}

Preset read_preset(const std::string& name_or_path) {
  for (const BuiltInPreset& preset : kBuiltInPresets) {
    if (preset.name == name_or_path) return parse_preset(preset.json, fmt::format("preset {}", preset.name));
  }
  std::ifstream in(name_or_path);
  if (!in) {
    std::string message = fmt::format("preset {}: {}", name_or_path, std::strerror(errno));
    std::vector<std::string_view> names;
    names.reserve(kBuiltInPresets.size());
    for (const BuiltInPreset& preset : kBuiltInPresets) names.push_back(preset.name);
    throw InvalidArgument(fmt::format("{}; built-in presets are {}", message, fmt::join(names, ", ")));
  }
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return parse_preset(text, fmt::format("preset {}", name_or_path));
}

std::string default_name(const Shape& s) {
  std::string name = fmt::format("b{} h{} s{} {}", s.b, s.h_q, s.s_k, short_dtype(s.dtype));
  if (s.s_q != 1) name += fmt::format(" sq{}", s.s_q);
  if (s.h_kv != 1) name += fmt::format(" hkv{}", s.h_kv);
  if (s.page_size != 64) name += fmt::format(" page{}", s.page_size);
  if (s.varlen) name += " varlen";
  if (s.causal) name += " causal";
  return name;
}

}  // namespace flash_mla::bench
