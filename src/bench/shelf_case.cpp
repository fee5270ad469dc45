#include "bench/shelf_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>

#include "bench/preset.h"
#include "bench/preset_json.h"
#include "flash_mla/error.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::json;

constexpr double kHalf = 2;  // bytes of an element
constexpr int kLatentWidth = 576, kRopePart = 64;

constexpr std::array kOperations{ShelfOperation::kMlaPrefill,  ShelfOperation::kGqa,
                                 ShelfOperation::kAppendPages, ShelfOperation::kAppendLatents,
                                 ShelfOperation::kRmsNorm,     ShelfOperation::kAddRmsNorm,
                                 ShelfOperation::kRope,        ShelfOperation::kRouting};

ShelfCase read_call(const Json& json, const std::string& where) {
  if (!json.is_object())
    throw InvalidArgument(fmt::format("{} is {}, expected an object", where, json.dump()));
  refuse_unknown_keys(
      json,
      {"name", "operation", "b", "s_q", "s_k", "causal", "page_size", "h_q", "h_kv", "d", "tokens", "topk"},
      where);
  ShelfCase c;
  using L = ShapeLimits;
  take_enum(json, "operation", kOperations, shelf_operation_name, where, c.operation);
  take_string(json, "name", where, c.name);
  take_integer(json, "b", 1, L::kMaxBatch, where, c.b);
  take_integer(json, "s_q", 1, L::kMaxTokens, where, c.s_q);
  take_integer(json, "s_k", 1, L::kMaxTokens, where, c.s_k);
  take_bool(json, "causal", where, c.causal);
  take_integer(json, "page_size", 1, L::kMaxPage, where, c.page_size);
  take_integer(json, "h_q", 1, L::kMaxHeads, where, c.h_q);
  c.h_kv = c.operation == ShelfOperation::kMlaPrefill ? c.h_q : std::min(c.h_kv, c.h_q);
  take_integer(json, "h_kv", 1, L::kMaxHeads, where, c.h_kv);
  take_integer(json, "d", 1, L::kMaxTokens, where, c.d);
  take_integer(json, "tokens", 1, L::kMaxTokens, where, c.tokens);
  take_integer(json, "topk", 1, c.d, where, c.topk);
  if (c.attention() && c.causal && c.s_k < c.s_q) {
    throw InvalidArgument(
        fmt::format("{}: \"s_k\" is {}, expected at least \"s_q\", {}", where, c.s_k, c.s_q));
  }
  if (c.h_q % c.h_kv != 0) {
    throw InvalidArgument(
        fmt::format("{}: \"h_q\" is {}, expected a multiple of \"h_kv\", {}", where, c.h_q, c.h_kv));
  }
  if (c.name.empty()) c.name = default_name(c);
  return c;
}

}  // namespace

const char* shelf_operation_name(ShelfOperation operation) {
  switch (operation) {
    case ShelfOperation::kMlaPrefill:
      return "mla_prefill";
    case ShelfOperation::kGqa:
      return "gqa_attention";
    case ShelfOperation::kAppendPages:
      return "append_pages";
    case ShelfOperation::kAppendLatents:
      return "append_kv";
    case ShelfOperation::kRmsNorm:
      return "rms_norm";
    case ShelfOperation::kAddRmsNorm:
      return "add_rms_norm";
    case ShelfOperation::kRope:
      return "apply_rope";
    case ShelfOperation::kRouting:
      return "choose_experts";
  }
  return "unknown";
}

double ShelfCase::flop() const {
  if (!attention()) return 0;
  const double queries = s_q, keys = s_k;
  const double pairs = queries * keys - (causal ? queries * (queries - 1) / 2 : 0);
  return 2.0 * b * h_q * pairs * (d_qk() + d_v());
}

double ShelfCase::bytes() const {
  const double n = tokens, q_and_out = kHalf * b * s_q * h_q * (d_qk() + d_v());
  switch (operation) {
    case ShelfOperation::kMlaPrefill:  // the rotary part of keys is shared by the heads
      return q_and_out + kHalf * b * s_k * (double{2} * h_q * d_v() + kRopePart);
    case ShelfOperation::kGqa:
      return q_and_out + 2 * kHalf * b * s_k * h_kv * double(d);
    case ShelfOperation::kAppendPages:  // keys and values, from and to; request and position, 32 bits each
      return n * (4 * kHalf * h_kv * d + 8);
    case ShelfOperation::kAppendLatents:  // its slot has 64 bits
      return n * (2 * kHalf * kLatentWidth + 8);
    case ShelfOperation::kRmsNorm:
      return kHalf * d * (2 * n + 1);
    case ShelfOperation::kAddRmsNorm:
      return kHalf * d * (4 * n + 1);
    case ShelfOperation::kRope:
      return n * (2 * kHalf * h_q * d + 4);
    case ShelfOperation::kRouting:
      return n * (4.0 * d + 8.0 * topk) + 4.0 * d;
  }
  return 0;
}

double ShelfCase::floor_us(const Rates& rates) const {
  if (!attention()) return bytes() / rates.copy_gbps / 1e3;
  const double reading = bytes() / rates.read_gbps / 1e3;
  return rates.mma_tflops > 0 ? std::max(flop() / rates.mma_tflops / 1e6, reading) : reading;
}

bool is_shelf_preset(const std::string& name_or_path) {
  std::string where;
  const Json json = load_preset(name_or_path, where);
  return json.is_object() && json.contains("calls");
}

std::vector<ShelfCase> read_shelf_preset(const std::string& name_or_path) {
  std::string where;
  const Json json = load_preset(name_or_path, where);
  if (!json.is_object() || !json.contains("calls") || !json["calls"].is_array() || json["calls"].empty()) {
    throw InvalidArgument(fmt::format("{}: expected an object with a non-empty array \"calls\"", where));
  }
  refuse_unknown_keys(json, {"description", "device", "calls"}, where);
  if (!json.contains("device") || json["device"] != "cuda") {
    throw InvalidArgument(fmt::format("{}: \"device\" is {}, expected \"cuda\"", where,
                                      json.contains("device") ? json["device"].dump() : "missing"));
  }
  std::vector<ShelfCase> calls;
  std::set<std::string> names;
  for (std::size_t i = 0; i < json["calls"].size(); ++i) {
    const std::string at = fmt::format("{}, calls[{}]", where, i);
    calls.push_back(read_call(json["calls"][i], at));
    if (!names.insert(calls.back().name).second)
      throw InvalidArgument(
          fmt::format("{}: another call is \"{}\", expected a name of its own", at, calls.back().name));
  }
  return calls;
}

std::string default_name(const ShelfCase& c) {
  const char* const name = shelf_operation_name(c.operation);
  switch (c.operation) {
    case ShelfOperation::kMlaPrefill:
      return fmt::format("{} b{} q{} k{} h{} {}", name, c.b, c.s_q, c.s_k, c.h_q,
                         c.causal ? "causal" : "full");
    case ShelfOperation::kGqa:
      return fmt::format("{} b{} q{} k{} h{}/{} d{}{}{}", name, c.b, c.s_q, c.s_k, c.h_q, c.h_kv, c.d,
                         c.page_size > 0 ? fmt::format(" page{}", c.page_size) : "",
                         c.s_q == 1 ? ""
                         : c.causal ? " causal"
                                    : " full");
    case ShelfOperation::kAppendPages:
      return fmt::format("{} n{} h{} d{}", name, c.tokens, c.h_kv, c.d);
    case ShelfOperation::kAppendLatents:
      return fmt::format("{} n{} bfloat16", name, c.tokens);
    case ShelfOperation::kRope:
      return fmt::format("{} n{} h{} d{}", name, c.tokens, c.h_q, c.d);
    case ShelfOperation::kRouting:
      return fmt::format("{} n{} {} of {}", name, c.tokens, c.topk, c.d);
    default:
      return fmt::format("{} n{} d{}", name, c.tokens, c.d);
  }
}

}  // namespace flash_mla::bench
