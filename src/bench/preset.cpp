#include "bench/preset.h"

#include <fmt/format.h>

#include <algorithm>

#include "bench/dtype.h"
#include "bench/preset_json.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::json;

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
  take_times(json, "peers_ms", where, s.peers_ms);
  take_string(json, "name", where, s.name);
  std::string dtype;
  take_string(json, "dtype", where, dtype);
  try {
    if (!dtype.empty()) s.dtype = parse_dtype(dtype);
  } catch (const InvalidArgument& e) {
    throw InvalidArgument(fmt::format("{}: {}", where, e.what()));
  }
  return s;
}

Preset parse_preset(const Json& json, const std::string& where) {
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
  std::string where;
  const Json json = load_preset(name_or_path, where);
  return parse_preset(json, where);
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
