#include "server/fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <string_view>

#include "server/body.h"
#include "server/limits.h"

namespace flash_mla::server {
namespace {

// Whether a value asks for nothing, by the field's own default.
using AsksNothing = bool (*)(const Body&);

bool is_false(const Body& v) { return v.is_boolean() && !v.get<bool>(); }
bool is_true(const Body& v) { return v.is_boolean() && v.get<bool>(); }
bool is_empty(const Body& v) {
  return is_false(v) || (v.is_string() && v.get_ref<const std::string&>().empty()) ||
         (v.is_structured() && v.empty());
}
template <int kValue>
bool is_number(const Body& v) {
  return v.is_number() && v.get<double>() == kValue;
}
bool never(const Body&) { return false; }
bool no_tool(const Body& v) { return is_empty(v) || v == "none" || v == "auto"; }
bool text_only(const Body& v) { return v == Body::array({"text"}); }
bool medium(const Body& v) { return v == "medium"; }

struct Unsupported {
  std::string_view name;
  AsksNothing asks_nothing;
};

// Of OpenAI's API and of other servers for the same models (vLLM, SGLang, llama.cpp, DeepSeek's own).
constexpr Unsupported kUnsupported[] = {
    // What is generated, and from what.
    {"functions", is_empty},
    {"function_call", no_tool},
    {"audio", is_empty},
    {"modalities", text_only},
    {"prediction", is_empty},
    {"web_search_options", never},
    {"verbosity", medium},
    {"reasoning", is_empty},
    {"reasoning_effort", is_empty},
    {"stream_reasoning", is_true},
    {"system", is_empty},
    {"documents", is_empty},
    {"prefix", is_empty},
    {"chat_template", is_empty},
    {"mm_processor_kwargs", is_empty},
    {"prompt_embeds", is_empty},
    {"truncate_prompt_tokens", never},
    {"lora_path", is_empty},
    {"lora_request", is_empty},
    {"cache_salt", is_empty},
    {"kv_transfer_params", is_empty},
    {"vllm_xargs", is_empty},
    // Structure of the text.
    {"structural_tag", is_empty},
    // Choice of tokens.
    {"min_length", is_number<0>},
    {"length_penalty", is_number<1>},
    {"use_beam_search", is_empty},
    {"early_stopping", is_empty},
    {"logits_processors", is_empty},
    {"custom_logit_processor", is_empty},
    {"custom_params", is_empty},
    {"session_params", is_empty},
    {"top_a", is_number<0>},
    {"typical_p", is_number<1>},
    {"tfs_z", is_number<1>},
    {"mirostat", is_number<0>},
    {"dynatemp_range", is_number<0>},
    {"xtc_probability", is_number<0>},
    {"dry_multiplier", is_number<0>},
    {"repeat_penalty", is_number<1>},
    {"samplers", is_empty},
    {"n_predict", never},
    {"n_probs", is_number<0>},
    // The end of the text, and its form.
    {"stop_sequences", is_empty},
    {"stop_regex", is_empty},
    {"no_stop_trim", is_empty},
    {"skip_special_tokens", is_true},
    {"return_token_ids", is_empty},
    {"return_tokens_as_token_ids", is_empty},
    {"return_hidden_states", is_empty},
};

// Of completions, or of chats, alone.
constexpr Unsupported kOfCompletions[] = {{"suffix", is_empty}, {"echo", is_empty}};
constexpr Unsupported kOfChats[] = {{"chat_template_kwargs", is_empty},
                                    {"continue_final_message", is_empty},
                                    {"thinking", is_empty},
                                    {"enable_thinking", never},
                                    {"add_generation_prompt", is_true}};

// Read elsewhere, or without effect on the answer.
constexpr std::string_view kKnown[] = {
    "model", "prompt", "messages", "stream", "stream_options", "n", "best_of", "max_tokens",
    "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "frequency_penalty", "presence_penalty", "seed", "stop", "stop_token_ids", "include_stop_str_in_output",
    "ignore_eos", "chat_template_kwargs", "logprobs", "top_logprobs", "response_format", "add_special_tokens",
    "suffix", "echo", "continue_final_message", "add_generation_prompt", "logit_bias", "allowed_token_ids",
    "bad_words", "bad_words_ids", "min_tokens", "prompt_logprobs",
    // read_format
    "structured_outputs", "grammar", "json_schema", "regex", "ebnf", "guided_json", "guided_regex",
    "guided_choice", "guided_grammar",
    // Who asks, and what the asker keeps.
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "request_id", "rid", "priority", "cache_prompt", "parallel_tool_calls", "tools",
    "tool_choice", "include_reasoning", "separate_reasoning", "thinking", "enable_thinking",
    // read_bootstrap
    "bootstrap_host", "bootstrap_port", "bootstrap_room",
    // Special tokens are left out of texts, so nothing stands between them.
    "spaces_between_special_tokens"};

constexpr std::string_view kGuided = "guided_";

ApiError not_supported(const std::string& name) {
  return bad_request(fmt::format("{} is not supported by this server", name), name);
}

void refuse_by_value(const Body& json, bool chat) {
  const Body* tools = chat ? nullptr : find(json, "tools");
  if (tools != nullptr && !is_empty(*tools)) throw not_supported("tools");
  const Body* choice = chat ? nullptr : find(json, "tool_choice");
  if (choice != nullptr && !no_tool(*choice)) throw not_supported("tool_choice");
  bool add_special_tokens = !chat;  // a chat template brings its own
  read(json, "add_special_tokens", add_special_tokens);
  if (add_special_tokens == chat) throw not_supported("add_special_tokens");
  const std::span<const Unsupported> others = chat ? std::span<const Unsupported>(kOfCompletions) : kOfChats;
  for (const auto& [name, asks_nothing] : others) {
    const Body* value = find(json, name.data());
    if (value == nullptr || asks_nothing(*value)) continue;
    throw bad_request(fmt::format("{} is a field of {}", name, chat ? "completions" : "chats"),
                      std::string(name));
  }
  int top_logprobs = 0;
  read(json, "top_logprobs", top_logprobs);
  if (!chat && top_logprobs != 0) {
    throw bad_request("top_logprobs is a field of chats, expected logprobs: that many alternatives",
                      "top_logprobs");
  }
  const Body* options = find(json, "stream_options");
  bool continuous = false;
  if (options != nullptr && options->is_object()) read(*options, "continuous_usage_stats", continuous);
  if (continuous) throw not_supported("stream_options.continuous_usage_stats");
}

}  // namespace

bool is_text(const Body& value) {
  const Body* type = value.is_object() ? find(value, "type") : nullptr;
  return type != nullptr && *type == "text";
}

void refuse_unsupported(const Body& json, bool chat) {
  for (const auto& [name, asks_nothing] : kUnsupported) {
    const Body* value = find(json, name.data());
    if (value != nullptr && !asks_nothing(*value)) throw not_supported(std::string(name));
  }
  // Sorted by name.
  for (auto it = json.get_ref<const Body::object_t&>().lower_bound(std::string(kGuided));
       it != json.get_ref<const Body::object_t&>().end() && it->first.starts_with(kGuided); ++it) {
    if (std::ranges::find(kKnown, it->first) != std::end(kKnown)) continue;
    if (!it->second.is_null() && !is_empty(it->second)) {
      throw not_supported(it->first.substr(0, kMaxLoggedBytes));
    }
  }
  refuse_by_value(json, chat);
}

void refuse_unsupported_message(const Body& message, std::size_t index, bool last) {
  for (const std::string_view name : {"function_call", "prefix", "partial", "audio", "refusal"}) {
    if (last && (name == "prefix" || name == "partial")) continue;
    const Body* value = find(message, name.data());
    if (value != nullptr && !is_empty(*value))
      throw not_supported(fmt::format("messages[{}].{}", index, name));
  }
}

std::vector<std::string> unknown_fields(const Body& json) {
  constexpr std::size_t kMaxNameBytes = 64;
  std::vector<std::string> out;
  for (const auto& [name, value] : json.get_ref<const Body::object_t&>()) {
    if (out.size() == kMaxUnknownFields) break;
    const bool known = std::ranges::find(kKnown, name) != std::end(kKnown) ||
                       std::ranges::find(kUnsupported, name, &Unsupported::name) != std::end(kUnsupported) ||
                       name.starts_with(kGuided);
    if (!known) out.push_back(name.substr(0, kMaxNameBytes));
  }
  return out;
}

}  // namespace flash_mla::server
