#include "bench/sparse_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "bench/preset.h"
#include "bench/preset_json.h"
#include "flash_mla/error.h"
#include "kv/format.h"

namespace flash_mla::bench {
namespace {

using Json = nlohmann::json;

constexpr int kDimV = 512;
constexpr double kHalf = 2;  // bytes of a query's or an output's element
constexpr double kIndex = 4;

constexpr std::array kOperations{SparseOperation::kSparseDecode, SparseOperation::kSparsePrefill,
                                 SparseOperation::kDenseFp8Decode, SparseOperation::kAppend,
                                 SparseOperation::kMerge};
constexpr std::array kFormats{KvFormat::kBFloat16, KvFormat::kFp8V32, KvFormat::kFp8V4, KvFormat::kFp8Tensor};

SparseCase read_case(const Json& json, const std::string& where) {
  if (!json.is_object())
    throw InvalidArgument(fmt::format("{} is {}, expected an object", where, json.dump()));
  refuse_unknown_keys(json,
                      {"name", "operation", "format", "b", "s_q", "h_q", "s_kv", "topk", "page_size",
                       "extra_topk", "extra_page_size", "peers_us", "resolve_us", "goal_us"},
                      where);
  SparseCase c;
  using L = ShapeLimits;
  take_enum(json, "operation", kOperations, sparse_operation_name, where, c.operation);
  take_enum(json, "format", kFormats, kv_format_name, where, c.format);
  take_string(json, "name", where, c.name);
  take_integer(json, "b", 1, L::kMaxBatch, where, c.b);
  const bool many = c.operation == SparseOperation::kAppend || c.operation == SparseOperation::kSparsePrefill;
  take_integer(json, "s_q", 1, many ? L::kMaxTokens : L::kMaxQueries, where, c.s_q);
  take_integer(json, "h_q", 1, L::kMaxHeads, where, c.h_q);
  take_integer(json, "s_kv", 1, L::kMaxTokens, where, c.s_kv);
  take_integer(json, "topk", 1, c.s_kv, where, c.topk);
  take_integer(json, "extra_topk", 0, c.s_kv, where, c.extra_topk);
  take_integer(json, "page_size", 1, L::kMaxTokens, where, c.page_size);
  take_integer(json, "extra_page_size", 1, L::kMaxTokens, where, c.extra_page_size);
  take_times(json, "peers_us", where, c.peers_us);
  take_number(json, "resolve_us", where, c.resolve_us);
  take_number(json, "goal_us", where, c.goal_us);
  if (c.operation == SparseOperation::kAppend && std::int64_t{c.b} * c.s_q > c.s_kv) {
    throw InvalidArgument(fmt::format("{}: \"s_kv\" is {}, expected at least the {} tokens that are written",
                                      where, c.s_kv, std::int64_t{c.b} * c.s_q));
  }
  if (c.name.empty()) c.name = default_name(c);
  return c;
}

double required_rate(const Json& rates, const char* key, const std::string& where) {
  std::optional<double> rate;
  take_number(rates, key, where, rate);
  if (!rate) throw InvalidArgument(fmt::format("{}: \"{}\" is missing", where, key));
  return *rate;
}

}  // namespace

const char* sparse_operation_name(SparseOperation operation) {
  switch (operation) {
    case SparseOperation::kSparseDecode:
      return "sparse_decode";
    case SparseOperation::kSparsePrefill:
      return "sparse_prefill";
    case SparseOperation::kDenseFp8Decode:
      return "dense_fp8_decode";
    case SparseOperation::kAppend:
      return "append_kv";
    case SparseOperation::kMerge:
      return "merge_states";
  }
  return "unknown";
}

double SparseCase::flop() const {
  if (copies()) return 0;
  const double queries = double{1} * b * s_q;
  const int keys = operation == SparseOperation::kDenseFp8Decode ? s_kv : topk + extra_topk;
  return 2.0 * h_q * queries * keys * (d_qk() + kDimV);
}

double SparseCase::bytes() const {
  const double queries = double{1} * b * s_q, token = kv::token_bytes(format, d_qk());
  const double q_and_out = queries * h_q * (d_qk() + kDimV) * kHalf;
  switch (operation) {
    case SparseOperation::kSparseDecode:
      return q_and_out + queries * (topk + extra_topk) * (token + kIndex);
    case SparseOperation::kSparsePrefill:
      return q_and_out + queries * topk * kIndex + std::min(queries * topk, double{1} * b * s_kv) * token;
    case SparseOperation::kDenseFp8Decode:
      return q_and_out + double{1} * b * s_kv * token;
    case SparseOperation::kAppend:
      // The row, its slot and position (64 bits each), cosines and sines of 32 pairs; the token.
      return queries * (d_qk() * kHalf + 16 + kv::kRopeWidth * 4 + token);
    case SparseOperation::kMerge:
      return 3 * queries * h_q * (kDimV * kHalf + 4);
  }
  return 0;
}

double SparseCase::floor_us(const Rates& rates) const {
  if (copies()) return bytes() / rates.copy_gbps / 1e3;
  return std::max(flop() / rates.mma_tflops / 1e6, bytes() / rates.read_gbps / 1e3);
}

std::optional<double> SparseCase::best_us() const {
  std::optional<double> best;
  for (const auto& peer : peers_us) best = std::min(best.value_or(peer.second), peer.second);
  return best;
}

bool is_sparse_preset(const std::string& name_or_path) {
  std::string where;
  const Json json = load_preset(name_or_path, where);
  return json.is_object() && json.contains("cases");
}

SparsePreset read_sparse_preset(const std::string& name_or_path) {
  std::string where;
  const Json json = load_preset(name_or_path, where);
  if (!json.is_object() || !json.contains("cases") || !json["cases"].is_array() || json["cases"].empty()) {
    throw InvalidArgument(fmt::format("{}: expected an object with a non-empty array \"cases\"", where));
  }
  refuse_unknown_keys(json, {"description", "device", "rates", "cases"}, where);
  if (!json.contains("device") || json["device"] != "cuda") {
    throw InvalidArgument(fmt::format("{}: \"device\" is {}, expected \"cuda\"", where,
                                      json.contains("device") ? json["device"].dump() : "missing"));
  }
  const Json rates = json.value("rates", Json::object());
  const std::string at = where + ", rates";
  refuse_unknown_keys(rates, {"read_gbps", "copy_gbps", "mma_tflops"}, at);
  SparsePreset preset;
  preset.rates = {required_rate(rates, "read_gbps", at), required_rate(rates, "copy_gbps", at),
                  required_rate(rates, "mma_tflops", at)};
  for (std::size_t i = 0; i < json["cases"].size(); ++i) {
    preset.cases.push_back(read_case(json["cases"][i], fmt::format("{}, cases[{}]", where, i)));
  }
  return preset;
}

std::string default_name(const SparseCase& c) {
  std::string name = sparse_operation_name(c.operation);
  const char* const format = kv_format_name(c.format);
  if (c.operation == SparseOperation::kAppend) return fmt::format("{} n{} {}", name, c.b * c.s_q, format);
  name += fmt::format(" b{} s_q{} h{}", c.b, c.s_q, c.h_q);
  switch (c.operation) {
    case SparseOperation::kSparseDecode:
      name += fmt::format(" topk{}", c.topk);
      if (c.extra_topk > 0) name += fmt::format("+{}", c.extra_topk);
      break;
    case SparseOperation::kSparsePrefill:
      name += fmt::format(" topk{} s_kv{}", c.topk, c.s_kv);
      break;
    case SparseOperation::kDenseFp8Decode:
      name += fmt::format(" s_kv{}", c.s_kv);
      break;
    default:
      return name;
  }
  return name + " " + format;
}

}  // namespace flash_mla::bench
