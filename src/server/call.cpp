#include "server/call.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "flash_mla/error.h"
#include "server/body.h"
#include "server/fields.h"
#include "server/format_fields.h"
#include "server/limits.h"
#include "server/token_rules.h"

namespace flash_mla::server {
namespace {

void read_stops(const Body& json, SamplingParams& p) {
  read(json, "include_stop_str_in_output", p.include_stop);
  if (const Body* stop = find(json, "stop")) {
    const auto add = [&](const Body& one) {
      if (!one.is_string()) throw wrong_type("stop", one, "a string or an array of strings");
      p.stop.push_back(one.get<std::string>());
      if (p.stop.size() > kMaxStops || p.stop.back().size() > kMaxStopBytes) {
        throw bad_request(fmt::format("stop has more than {} strings or one of more than {} bytes", kMaxStops,
                                      kMaxStopBytes),
                          "stop");
      }
    };
    if (stop->is_array()) {
      for (const Body& one : *stop) add(one);
    } else {
      add(*stop);
    }
  }
  if (const Body* ids = find(json, "stop_token_ids")) {
    if (!ids->is_array()) throw wrong_type("stop_token_ids", *ids, "an array of token ids");
    p.stop_token_ids = token_ids(*ids, "stop_token_ids");
    if (p.stop_token_ids.size() > kMaxStops) {
      throw bad_request(fmt::format("stop_token_ids has {} tokens, expected at most {}",
                                    p.stop_token_ids.size(), kMaxStops),
                        "stop_token_ids");
    }
  }
}

SamplingParams sampling(const Body& json, bool chat, const SamplingParams& defaults) {
  SamplingParams p = defaults;
  // OpenAI's defaults: 16 tokens of a completion, a chat answer as long as it gets.
  p.max_tokens = chat ? std::numeric_limits<int>::max() : 16;
  read(json, "max_tokens", p.max_tokens);
  read(json, "max_completion_tokens", p.max_tokens);
  read(json, "n", p.n);
  read(json, "temperature", p.temperature);
  read(json, "top_p", p.top_p);
  read(json, "top_k", p.top_k);
  if (p.top_k == -1) p.top_k = 0;  // what other servers call "all"
  read(json, "min_p", p.min_p);
  read(json, "repetition_penalty", p.repetition_penalty);
  read(json, "frequency_penalty", p.frequency_penalty);
  read(json, "presence_penalty", p.presence_penalty);
  read(json, "ignore_eos", p.ignore_eos);
  if (const Body* seed = find(json, "seed")) p.seed = static_cast<std::uint64_t>(integer(*seed, "seed"));
  read_stops(json, p);
  read_token_rules(json, p);
  if (find(json, "prompt_logprobs") != nullptr) {
    p.prompt_logprobs = 0;
    read(json, "prompt_logprobs", p.prompt_logprobs);
    if (p.prompt_logprobs < 0) {
      throw bad_request(fmt::format("prompt_logprobs is {}, expected 0 to {} alternatives", p.prompt_logprobs,
                                    kMaxLogprobs),
                        "prompt_logprobs");
    }
  }
  return p;
}

/// What the chat template is to see besides the messages, with keys in the client's order.
std::string chat_variables(const Body& json, std::string_view body) {
  constexpr const char* kName = "chat_template_kwargs";
  const Body* variables = find(json, kName);
  if (variables == nullptr) return "";
  if (!variables->is_object()) throw wrong_type(kName, *variables, "an object");
  const std::string_view text = raw_field(body, kName);
  if (text.size() > kMaxChatVariableBytes) {
    throw bad_request(
        fmt::format("{} has {} bytes, expected at most {}", kName, text.size(), kMaxChatVariableBytes),
        kName);
  }
  return std::string(text);
}

// DeepSeek's own field, and that of others: both ask for the switch that the model's template has.
void read_thinking(const Body& json, Call& call) {
  if (const Body* thinking = find(json, "thinking")) {
    const Body* type = thinking->is_object() ? find(*thinking, "type") : nullptr;
    if (type == nullptr || thinking->size() > 1 || (*type != "enabled" && *type != "disabled")) {
      throw bad_request("thinking: expected {\"type\": \"enabled\"} or {\"type\": \"disabled\"}", "thinking");
    }
    call.thinking = *type == "enabled";
    call.thinking_field = "thinking";
  }
  if (find(json, "enable_thinking") == nullptr) return;
  bool on = false;
  read(json, "enable_thinking", on);
  if (call.thinking.value_or(on) != on)
    throw bad_request("thinking and enable_thinking: expected one of them", "enable_thinking");
  call.thinking = on;
  call.thinking_field = "enable_thinking";
}

std::vector<Request> prompts(const Body& json) {
  const Body* prompt = find(json, "prompt");
  if (prompt == nullptr) throw bad_request("prompt is missing, expected text or token ids", "prompt");
  std::vector<Request> out;
  const auto add = [&](const Body& one) {
    Request& r = out.emplace_back();
    if (one.is_string()) {
      r.prompt = one.get<std::string>();
      r.allow_special = false;
    } else if (one.is_array()) {
      r.prompt_token_ids = token_ids(one, "prompt");
    } else {
      throw wrong_type("prompt", one, "text, token ids, or an array of those");
    }
  };
  const bool several =
      prompt->is_array() && !prompt->empty() && (prompt->front().is_string() || prompt->front().is_array());
  if (several) {
    if (prompt->size() > std::size_t{kMaxChoices}) {
      throw bad_request(
          fmt::format("prompt has {} prompts, expected at most {}", prompt->size(), kMaxChoices), "prompt");
    }
    for (const Body& one : *prompt) add(one);
  } else {
    add(*prompt);
  }
  return out;
}

// What the whole of a conversation says of its end.
void read_end(const Body& json, Request& request) {
  read(json, "continue_final_message", request.continue_final_message);
  // The same by the names of DeepSeek's and Moonshot's own servers.
  const Body& last = json["messages"].back();
  for (const char* name : {"prefix", "partial"}) {
    bool open = false;
    read(last, name, open);
    request.continue_final_message |= open;
  }
  request.add_generation_prompt = !request.continue_final_message;
  read(json, "add_generation_prompt", request.add_generation_prompt);
  if (request.continue_final_message && request.add_generation_prompt) {
    throw bad_request("continue_final_message and add_generation_prompt: expected one of them",
                      "continue_final_message");
  }
  if (request.continue_final_message && request.messages.back().role != "assistant") {
    throw bad_request(
        fmt::format("continue_final_message: the last message is the {}'s, expected the assistant's",
                    request.messages.back().role),
        "continue_final_message");
  }
}

void read_completion(const Body& json, Call& call, SamplingParams& p) {
  read(json, "logprobs", p.logprobs);
  call.logprobs = p.logprobs >= 0;
  call.requests = prompts(json);
  read(json, "echo", call.echo);
  if (call.echo && (call.logprobs || p.max_tokens == 0))
    p.prompt_logprobs = std::max(p.prompt_logprobs, p.logprobs);
  if (call.echo && p.max_tokens == 0) p.prompt_logprobs = std::max(p.prompt_logprobs, 0);
  const Body* suffix = find(json, "suffix");
  if (suffix == nullptr) return;
  if (!suffix->is_string()) throw wrong_type("suffix", *suffix, "a string");
  for (Request& r : call.requests) {
    r.suffix = suffix->get<std::string>();
    if (!r.suffix.empty() && r.prompt.empty())
      throw bad_request("suffix: expected a text as prompt", "suffix");
  }
}

// best_of continuations of each prompt, of which the n best are answered.
void read_best_of(const Body& json, Call& call, SamplingParams& p) {
  call.n = call.num_continuations = p.n;
  int best_of = p.n;
  read(json, "best_of", best_of);
  if (best_of == 1) best_of = p.n;  // the default
  if (best_of < p.n)
    throw bad_request(fmt::format("best_of is {}, expected at least n, {}", best_of, p.n), "best_of");
  if (best_of == p.n) return;
  if (call.stream) {
    throw bad_request("best_of above n: not together with stream; which is best is known at the end",
                      "best_of");
  }
  call.num_continuations = p.n = best_of;
  p.logprobs = std::max(p.logprobs, 0);
}

// Where a router has a prefill and a decode server meet, in SGLang's fields: null and absent are the same.
void read_bootstrap(const Body& json, Call& call) {
  const Body* room = find(json, "bootstrap_room");
  if (room == nullptr) {
    if (const Body* host = find(json, "bootstrap_host"); host != nullptr)
      throw bad_request("bootstrap_host: expected together with bootstrap_room", "bootstrap_host");
    return;
  }
  BootstrapRoom out;
  out.room = integer(*room, "bootstrap_room");
  if (const Body* host = find(json, "bootstrap_host")) {
    if (!host->is_string()) throw wrong_type("bootstrap_host", *host, "a string");
    out.host = host->get<std::string>();
    if (out.host.size() > kMaxHostBytes)
      throw bad_request(
          fmt::format("bootstrap_host has {} bytes, expected at most {}", out.host.size(), kMaxHostBytes),
          "bootstrap_host");
  }
  read(json, "bootstrap_port", out.port);
  if (call.requests.size() != 1)
    throw bad_request(fmt::format("bootstrap_room: expected a single prompt, got {}", call.requests.size()),
                      "bootstrap_room");
  call.requests.front().bootstrap = std::move(out);
}

void check_model(const Body& json, const std::vector<std::string>& model_names) {
  const Body* model = find(json, "model");
  const std::string expected = fmt::format("\"{}\"", fmt::join(model_names, "\" or \""));
  if (model == nullptr) throw bad_request("model is missing, expected " + expected, "model");
  if (!model->is_string()) throw wrong_type("model", *model, "a string");
  const std::string& name = model->get_ref<const std::string&>();
  if (std::ranges::find(model_names, name) == model_names.end()) {
    throw ApiError(404, "invalid_request_error",
                   fmt::format("model \"{}\" does not exist, expected {}", name, expected), "model",
                   "model_not_found");
  }
}

}  // namespace

Call parse_call(std::string_view body, bool chat, const std::vector<std::string>& model_names,
                const SamplingParams& defaults) {
  const Body json = parse_body(body);
  check_model(json, model_names);
  refuse_unsupported(json, chat);

  Call call;
  call.chat = chat;
  call.unknown_fields = unknown_fields(json);
  read(json, "stream", call.stream);
  if (const Body* options = find(json, "stream_options")) {
    if (!options->is_object()) throw wrong_type("stream_options", *options, "an object");
    if (!call.stream) throw bad_request("stream_options: expected together with stream", "stream_options");
    read(*options, "include_usage", call.include_usage);
  }
  SamplingParams p = sampling(json, chat, defaults);
  if (chat) {
    read(json, "logprobs", call.logprobs);
    int top = 0;
    read(json, "top_logprobs", top);
    if (top != 0 && !call.logprobs)
      throw bad_request("top_logprobs: expected together with logprobs", "top_logprobs");
    if (call.logprobs) p.logprobs = top;
    call.requests.emplace_back().messages = read_messages(json);
    read_end(json, call.requests.back());
    call.requests.back().chat_variables = chat_variables(json, body);
    read_thinking(json, call);
    call.tools = read_tools(json, body);
    read(json, "separate_reasoning", call.separate_reasoning);
    read(json, "include_reasoning", call.include_reasoning);
  } else {
    read_completion(json, call, p);
  }
  read_bootstrap(json, call);
  FormatField format = read_format(json, body);
  p.format = std::move(format.format);
  call.format_field = std::move(format.name);
  call.prompt_logprobs = find(json, "prompt_logprobs") != nullptr;
  read_best_of(json, call, p);
  try {
    validate(p);
  } catch (const InvalidArgument& e) {
    const std::string message = e.what();
    throw bad_request(message, message.substr(0, message.find(' ')));
  }
  const std::int64_t choices = static_cast<std::int64_t>(call.requests.size()) * p.n;
  if (choices > kMaxChoices) {
    throw bad_request(fmt::format("{} prompts times n = {}, expected at most {} choices",
                                  call.requests.size(), p.n, kMaxChoices),
                      "n");
  }
  call.num_choices = static_cast<int>(choices);
  for (Request& r : call.requests) {
    r.sampling = p;
    if (call.echo) call.echoed.push_back(r.prompt);
  }
  return call;
}

TokenizeCall parse_tokenize(std::string_view body) {
  const Body json = parse_body(body);
  const Body* prompt = find(json, "prompt");
  if (prompt == nullptr || !prompt->is_string()) {
    throw bad_request("prompt is missing or no string, expected text", "prompt");
  }
  TokenizeCall call;
  call.prompt = prompt->get<std::string>();
  read(json, "add_special_tokens", call.add_special_tokens);
  return call;
}

DetokenizeCall parse_detokenize(std::string_view body, std::int32_t vocab_size) {
  const Body json = parse_body(body);
  const Body* tokens = find(json, "tokens");
  if (tokens == nullptr || !tokens->is_array()) {
    throw bad_request("tokens is missing or no array, expected token ids", "tokens");
  }
  for (std::size_t i = 0; i < tokens->size(); ++i) {
    const std::int64_t id = integer((*tokens)[i], "tokens");
    if (id >= 0 && id < vocab_size) continue;
    throw bad_request(fmt::format("tokens[{}] is {}, expected 0 to {}", i, id, vocab_size - 1), "tokens");
  }
  DetokenizeCall call;
  call.tokens = token_ids(*tokens, "tokens");
  read(json, "skip_special_tokens", call.skip_special_tokens);
  return call;
}

}  // namespace flash_mla::server
