#include "server/api.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "flash_mla/error.h"

namespace flash_mla::server {
namespace {

constexpr int kMostNested = 32;
constexpr std::size_t kMostPrompts = 256;
constexpr int kMostChoices = 128;
// Each is looked for in every token's text, in the engine's thread.
constexpr std::size_t kMostStops = 64, kMostStopBytes = 1024;

// Exact for JSON; what is none is refused either way.
bool nested_deeper_than(int limit, std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '"') {
      quoted = !quoted;
    } else if (quoted) {
      if (c == '\\') ++i;
    } else if (c == '[' || c == '{') {
      if (++depth > limit) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

// A field's value if it is there and not null.
const Body* find(const Body& json, const char* key) {
  const auto it = json.find(key);
  return it == json.end() || it->is_null() ? nullptr : &*it;
}

ApiError wrong_type(const char* key, const Body& value, const char* expected) {
  return bad_request(fmt::format("{} is {}, expected {}", key, value.type_name(), expected), key);
}

void read(const Body& json, const char* key, double& out) {
  if (const Body* v = find(json, key)) {
    if (!v->is_number()) throw wrong_type(key, *v, "a number");
    out = v->get<double>();
  }
}

std::int64_t integer(const Body& v, const char* key) {
  if (!v.is_number_integer()) throw wrong_type(key, v, "an integer");
  if (v.is_number_unsigned() && v.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max()) {
    throw bad_request(fmt::format("{} is {}, expected less than 2^63", key, v.get<std::uint64_t>()), key);
  }
  return v.get<std::int64_t>();
}

void read(const Body& json, const char* key, int& out) {
  if (const Body* v = find(json, key)) {
    const std::int64_t value = integer(*v, key);
    if (value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
      throw bad_request(fmt::format("{} is {}, expected a 32-bit integer", key, value), key);
    }
    out = static_cast<int>(value);
  }
}

void read(const Body& json, const char* key, bool& out) {
  if (const Body* v = find(json, key)) {
    if (!v->is_boolean()) throw wrong_type(key, *v, "true or false");
    out = v->get<bool>();
  }
}

std::vector<std::int32_t> token_ids(const Body& v, const char* key) {
  std::vector<std::int32_t> out;
  for (const Body& id : v) {
    const std::int64_t value = integer(id, key);
    // Out of the vocabulary either way: the engine's message says what was expected.
    out.push_back(static_cast<std::int32_t>(
        std::clamp<std::int64_t>(value, -1, std::numeric_limits<std::int32_t>::max())));
  }
  return out;
}

SamplingParams sampling(const Body& json, bool chat) {
  SamplingParams p;
  // OpenAI's defaults: 16 tokens of a completion, a chat answer as long as it gets.
  p.max_tokens = chat ? std::numeric_limits<int>::max() : 16;
  read(json, "max_tokens", p.max_tokens);
  if (chat) read(json, "max_completion_tokens", p.max_tokens);
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
  if (const Body* stop = find(json, "stop")) {
    const auto add = [&](const Body& one) {
      if (!one.is_string()) throw wrong_type("stop", one, "a string or an array of strings");
      p.stop.push_back(one.get<std::string>());
      if (p.stop.size() > kMostStops || p.stop.back().size() > kMostStopBytes) {
        throw bad_request(fmt::format("stop has more than {} strings or one of more than {} bytes",
                                      kMostStops, kMostStopBytes),
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
    if (p.stop_token_ids.size() > kMostStops) {
      throw bad_request(fmt::format("stop_token_ids has {} tokens, expected at most {}",
                                    p.stop_token_ids.size(), kMostStops),
                        "stop_token_ids");
    }
  }
  return p;
}

/// An object whose type is "text".
bool is_text(const Body& value) {
  const Body* type = value.is_object() ? find(value, "type") : nullptr;
  return type != nullptr && *type == "text";
}

std::string text_of(const Body& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) throw wrong_type("messages", content, "a string or text parts as content");
  std::string text;
  for (const Body& part : content) {
    const Body* value = is_text(part) ? find(part, "text") : nullptr;
    if (value == nullptr || !value->is_string()) {
      throw bad_request("messages: a part of content is not text; this model reads text only", "messages");
    }
    text += value->get_ref<const std::string&>();
  }
  return text;
}

std::vector<ChatMessage> messages(const Body& json) {
  const Body* list = find(json, "messages");
  if (list == nullptr || !list->is_array() || list->empty()) {
    throw bad_request("messages is missing or empty, expected an array of messages", "messages");
  }
  std::vector<ChatMessage> out;
  for (const Body& m : *list) {
    if (!m.is_object() || !m.contains("role") || !m["role"].is_string() || !m.contains("content")) {
      throw bad_request("messages: expected objects with role and content", "messages");
    }
    // OpenAI's newer name of the same.
    const std::string role = m["role"] == "developer" ? "system" : m["role"].get<std::string>();
    out.push_back({role, text_of(m["content"])});
  }
  return out;
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
    for (const Body& one : *prompt) add(one);
  } else {
    add(*prompt);
  }
  return out;
}

// Refuses what would otherwise be ignored without a word.
void refuse_unsupported(const Body& json, bool chat) {
  const auto refuse = [&](const char* key) {
    throw bad_request(fmt::format("{} is not supported by this server", key), key);
  };
  for (const char* key : {"suffix", "logit_bias", "functions", "tools", "audio", "prediction"}) {
    const Body* v = find(json, key);
    if (v != nullptr && !v->empty()) refuse(key);
  }
  bool echo = false;
  read(json, "echo", echo);
  if (echo) refuse("echo");
  if (const Body* format = find(json, "response_format")) {
    if (!is_text(*format)) refuse("response_format");
  }
  int best_of = 1, n = 1;
  read(json, "best_of", best_of);
  read(json, "n", n);
  if (!chat && best_of != 1 && best_of != n) refuse("best_of");
}

}  // namespace

ApiError bad_request(const std::string& message, std::string param) {
  return {400, "invalid_request_error", message, std::move(param)};
}

Json ApiError::body() const {
  const auto or_null = [](const std::string& s) { return s.empty() ? Json() : Json(s); };
  return {{"error",
           {{"message", what()}, {"type", type_}, {"param", or_null(param_)}, {"code", or_null(code_)}}}};
}

Body parse_body(std::string_view text) {
  // Not with a callback of the parser: it searches all of an array whenever an object in it ends.
  if (nested_deeper_than(kMostNested, text)) {
    throw bad_request(fmt::format("the body is nested more than {} deep", kMostNested));
  }
  Body body = Body::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!body.is_object()) throw bad_request("the body is not a JSON object");
  return body;
}

Call parse_call(std::string_view body, bool chat, const std::string& model_name) {
  const Body json = parse_body(body);
  if (const Body* model = find(json, "model")) {
    if (!model->is_string()) throw wrong_type("model", *model, "a string");
    if (model->get<std::string>() != model_name) {
      throw ApiError(
          404, "invalid_request_error",
          fmt::format("model \"{}\" does not exist, expected \"{}\"", model->get<std::string>(), model_name),
          "model", "model_not_found");
    }
  } else {
    throw bad_request(fmt::format("model is missing, expected \"{}\"", model_name), "model");
  }
  refuse_unsupported(json, chat);

  Call call;
  call.chat = chat;
  read(json, "stream", call.stream);
  if (const Body* options = find(json, "stream_options")) {
    if (!options->is_object()) throw wrong_type("stream_options", *options, "an object");
    if (!call.stream) throw bad_request("stream_options: expected together with stream", "stream_options");
    read(*options, "include_usage", call.include_usage);
  }
  SamplingParams p = sampling(json, chat);
  if (chat) {
    read(json, "logprobs", call.logprobs);
    int top = 0;
    read(json, "top_logprobs", top);
    if (top != 0 && !call.logprobs)
      throw bad_request("top_logprobs: expected together with logprobs", "top_logprobs");
    if (call.logprobs) p.logprobs = top;
    call.requests.emplace_back().messages = messages(json);
  } else {
    read(json, "logprobs", p.logprobs);
    call.logprobs = p.logprobs >= 0;
    call.requests = prompts(json);
  }
  try {
    validate(p);
  } catch (const InvalidArgument& e) {
    const std::string message = e.what();
    throw bad_request(message, message.substr(0, message.find(' ')));
  }
  const std::int64_t choices = static_cast<std::int64_t>(call.requests.size()) * p.n;
  if (call.requests.size() > kMostPrompts || choices > kMostChoices) {
    throw bad_request(fmt::format("{} prompts times n = {}, expected at most {} prompts and {} choices",
                                  call.requests.size(), p.n, kMostPrompts, kMostChoices),
                      "n");
  }
  call.num_choices = static_cast<int>(choices);
  for (Request& r : call.requests) r.sampling = p;
  return call;
}

std::string parse_tokenize(std::string_view body) {
  const Body json = parse_body(body);
  const Body* prompt = find(json, "prompt");
  if (prompt == nullptr || !prompt->is_string()) {
    throw bad_request("prompt is missing or no string, expected text", "prompt");
  }
  return prompt->get<std::string>();
}

Answer::Answer(const Call& call, std::string id, std::string model_name, std::int64_t created,
               const Engine& engine)
    : chat_(call.chat),
      include_usage_(call.include_usage),
      logprobs_(call.logprobs),
      id_(std::move(id)),
      model_name_(std::move(model_name)),
      created_(created),
      engine_(engine),
      choices_(static_cast<std::size_t>(call.num_choices)) {}

Json Answer::head(const char* object) const {
  return {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_name_}};
}

void Answer::count(const GenerationEvent& e) {
  if (e.finish == FinishReason::kError) error_ = e.error;
  if (e.finish == FinishReason::kNone) return;
  usage_.completion_tokens += e.usage.completion_tokens;
  // A prompt counts once, however many continuations it has.
  if (std::ranges::find(prompts_counted_, e.request) != prompts_counted_.end()) return;
  prompts_counted_.push_back(e.request);
  usage_.prompt_tokens += e.usage.prompt_tokens;
  usage_.cached_tokens += e.usage.cached_tokens;
}

Json Answer::usage() const {
  return {{"prompt_tokens", usage_.prompt_tokens},
          {"completion_tokens", usage_.completion_tokens},
          {"total_tokens", usage_.prompt_tokens + usage_.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage_.cached_tokens}}}};
}

// Tokens as text; bytes that are no text on their own become U+FFFD when the JSON is written.
Json Answer::logprobs_json(Choice& choice, const GenerationEvent& e) const {
  if (!logprobs_) return nullptr;
  if (chat_) {
    const auto entry = [&](const TokenLogprob& t) {
      const std::string bytes = engine_.token_bytes(t.token);
      Json values = Json::array();
      for (const char c : bytes) values.push_back(static_cast<unsigned char>(c));
      return Json{{"token", bytes}, {"logprob", t.logprob}, {"bytes", values}};
    };
    Json content = Json::array();
    for (const TokenLogprobs& l : e.logprobs) {
      Json one = entry(l.chosen);
      one["top_logprobs"] = Json::array();
      for (const TokenLogprob& t : l.top) one["top_logprobs"].push_back(entry(t));
      content.push_back(one);
    }
    return {{"content", content}};
  }
  Json out = {{"tokens", Json::array()},
              {"token_logprobs", Json::array()},
              {"top_logprobs", Json::array()},
              {"text_offset", Json::array()}};
  for (const TokenLogprobs& l : e.logprobs) {
    const std::string bytes = engine_.token_bytes(l.chosen.token);
    out["tokens"].push_back(bytes);
    out["token_logprobs"].push_back(l.chosen.logprob);
    Json top = Json::object();
    for (const TokenLogprob& t : l.top) top[engine_.token_bytes(t.token)] = t.logprob;
    out["top_logprobs"].push_back(top);
    out["text_offset"].push_back(choice.num_characters);
    choice.num_characters += std::ranges::count_if(bytes, [](char c) { return (c & 0xC0) != 0x80; });
  }
  return out;
}

Json Answer::chunk(int index, const GenerationEvent& e) {
  count(e);
  Choice& choice = choices_[static_cast<std::size_t>(index)];
  Json one = {{"index", index}};
  if (chat_) {
    one["delta"] = Json::object();
    if (!choice.begun) one["delta"]["role"] = "assistant";
    if (!choice.begun || !e.text.empty()) one["delta"]["content"] = e.text;
  } else {
    one["text"] = e.text;
  }
  choice.begun = true;
  one["logprobs"] = e.logprobs.empty() ? Json() : logprobs_json(choice, e);
  one["finish_reason"] = e.finish == FinishReason::kNone ? Json() : Json(finish_reason_name(e.finish));
  Json out = head(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = Json::array({one});
  if (include_usage_) out["usage"] = nullptr;
  return out;
}

Json Answer::usage_chunk() const {
  Json out = head(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = Json::array();
  out["usage"] = usage();
  return out;
}

void Answer::collect(int index, const GenerationEvent& e) {
  count(e);
  Choice& choice = choices_[static_cast<std::size_t>(index)];
  choice.text += e.text;
  if (e.finish != FinishReason::kNone) choice.finish_reason = finish_reason_name(e.finish);
  const Json more = logprobs_json(choice, e);
  if (more.is_null()) return;
  if (!choice.logprobs) {
    choice.logprobs = more;
    return;
  }
  for (const auto& [key, list] : more.items()) {
    for (const Json& value : list) (*choice.logprobs)[key].push_back(value);
  }
}

Json Answer::complete() const {
  if (!error_.empty()) throw ApiError(500, "server_error", error_);
  Json out = head(chat_ ? "chat.completion" : "text_completion");
  out["choices"] = Json::array();
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    Json one = {{"index", i}};
    if (chat_) {
      one["message"] = {{"role", "assistant"}, {"content", choice.text}};
    } else {
      one["text"] = choice.text;
    }
    one["logprobs"] = choice.logprobs.value_or(Json());
    one["finish_reason"] = choice.finish_reason;
    out["choices"].push_back(one);
  }
  out["usage"] = usage();
  return out;
}

}  // namespace flash_mla::server
