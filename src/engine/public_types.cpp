// What the plain types of the public header do.

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "flash_mla/engine.h"
#include "flash_mla/error.h"

namespace flash_mla {

void validate(const SamplingParams& p) {
  const auto require = [](bool ok, const char* field, auto value, const char* expected) {
    if (!ok) throw InvalidArgument(fmt::format("{} is {}, expected {}", field, value, expected));
  };
  // Comparisons are written so that NaN fails them.
  require(p.max_tokens >= 0, "max_tokens", p.max_tokens, "at least 0");
  require(p.n >= 1 && p.n <= 1024, "n", p.n, "1 to 1024");
  require(p.temperature >= 0 && p.temperature <= 1e6, "temperature", p.temperature, "0 to 1e6");
  require(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number in (0, 1]");
  require(p.top_k >= 0, "top_k", p.top_k, "0 (all) or more");
  require(p.min_p >= 0 && p.min_p < 1, "min_p", p.min_p, "a number in [0, 1)");
  require(p.repetition_penalty >= 0.01 && p.repetition_penalty <= 100, "repetition_penalty",
          p.repetition_penalty, "0.01 to 100");
  require(p.frequency_penalty >= -2 && p.frequency_penalty <= 2, "frequency_penalty", p.frequency_penalty,
          "-2 to 2");
  require(p.presence_penalty >= -2 && p.presence_penalty <= 2, "presence_penalty", p.presence_penalty,
          "-2 to 2");
  require(p.logprobs >= -1 && p.logprobs <= kMaxLogprobs, "logprobs", p.logprobs,
          "-1 (none) to 20 alternatives");
  require(p.prompt_logprobs >= -1 && p.prompt_logprobs <= kMaxLogprobs, "prompt_logprobs", p.prompt_logprobs,
          "-1 (none) to 20 alternatives");
  require(p.max_tokens > 0 || p.prompt_logprobs >= 0, "max_tokens", p.max_tokens,
          "at least 1, or prompt_logprobs");
  require(p.min_tokens >= 0 && p.min_tokens <= p.max_tokens, "min_tokens", p.min_tokens, "0 to max_tokens");
  require(p.best_of == 0 || (p.best_of >= p.n && p.best_of <= 1024), "best_of", p.best_of,
          "0 (n), or n to 1024");
  for (const LogitBias& b : p.logit_bias) {
    require(b.bias >= -100 && b.bias <= 100, "logit_bias", b.bias, "values from -100 to 100");
    require(b.token >= 0, "logit_bias", b.token, "token ids");
  }
  for (const std::int32_t id : p.allowed_token_ids) require(id >= 0, "allowed_token_ids", id, "token ids");
  for (const std::string& s : p.bad_words)
    require(!s.empty(), "bad_words", "\"\"", "texts that are not empty");
  for (const std::vector<std::int32_t>& run : p.bad_token_ids) {
    require(!run.empty(), "bad_token_ids", "[]", "runs of tokens that are not empty");
    for (const std::int32_t id : run) require(id >= 0, "bad_token_ids", id, "token ids");
  }
  require(p.format.is_free() || p.stop.empty(), "stop", p.stop.size(),
          "no stop strings together with a format of the text, which they could cut");
  for (const std::string& s : p.stop) require(!s.empty(), "stop", "\"\"", "texts that are not empty");
  for (const std::int32_t id : p.stop_token_ids) require(id >= 0, "stop_token_ids", id, "token ids");
}

void Histogram::add(double value) {
  const auto bucket = std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin();
  counts.resize(bounds.size() + 1);
  ++counts[static_cast<std::size_t>(bucket)];
  sum += value;
  ++total;
}

double Histogram::quantile(double q) const {
  if (total == 0) return 0;
  const double wanted = std::clamp(q, 0.0, 1.0) * static_cast<double>(total);
  double below = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto count = static_cast<double>(counts[i]);
    if (count > 0 && below + count >= wanted) {
      if (i == bounds.size()) break;  // past the last bound nothing more is known
      const double low = i == 0 ? 0 : bounds[i - 1];
      return low + (bounds[i] - low) * (wanted - below) / count;
    }
    below += count;
  }
  return bounds.empty() ? 0 : bounds.back();
}

const char* tool_format_name(ToolFormat format) {
  switch (format) {
    case ToolFormat::kNone:
      return "none";
    case ToolFormat::kDeepSeekV3:
      return "deepseek_v3";
    case ToolFormat::kDeepSeekV31:
      return "deepseek_v31";
    case ToolFormat::kDeepSeekV32:
      return "deepseek_v32";
    case ToolFormat::kDeepSeekV4:
      return "deepseek_v4";
    case ToolFormat::kGlm45:
      return "glm45";
    case ToolFormat::kGlm47:
      return "glm47";
    case ToolFormat::kKimiK2:
      return "kimi_k2";
  }
  return "";
}

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kError:
      return "error";
  }
  throw std::logic_error("unknown finish reason");
}

const char* length_limit_name(LengthLimit limit) {
  switch (limit) {
    case LengthLimit::kNone:
      return "";
    case LengthLimit::kMaxTokens:
      return "max_tokens";
    case LengthLimit::kModel:
      return "model";
    case LengthLimit::kOption:
      return "max_model_len";
    case LengthLimit::kCache:
      return "cache";
  }
  throw std::logic_error("unknown limit of a length");
}

}  // namespace flash_mla
