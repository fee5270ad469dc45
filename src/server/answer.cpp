#include "server/answer.h"

#include <algorithm>

namespace flash_mla::server {

std::string limited_by(const GenerationEvent& event) {
  return event.limit == LengthLimit::kMaxTokens ? "" : length_limit_name(event.limit);
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
  if (const std::string limit = limited_by(e); !limit.empty()) one["limited_by"] = limit;
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
  choice.limited_by = limited_by(e);
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
    if (!choice.limited_by.empty()) one["limited_by"] = choice.limited_by;
    out["choices"].push_back(one);
  }
  out["usage"] = usage();
  return out;
}

}  // namespace flash_mla::server
