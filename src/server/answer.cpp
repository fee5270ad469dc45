#include "server/answer.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

namespace flash_mla::server {

namespace {

// The name in the first piece of a call, then its arguments.
Json delta_of(const ToolCallPiece& piece) {
  Json function = Json::object();
  if (!piece.name.empty()) function["name"] = piece.name;
  function["arguments"] = piece.arguments;
  Json out = {{"index", piece.index}};
  if (!piece.name.empty()) {
    out["id"] = piece.id;
    out["type"] = "function";
  }
  out["function"] = std::move(function);
  return out;
}

void collect_call(const ToolCallPiece& piece, Json& calls) {
  if (!piece.name.empty()) {
    calls.push_back(
        {{"id", piece.id}, {"type", "function"}, {"function", {{"name", piece.name}, {"arguments", ""}}}});
  }
  calls.back()["function"]["arguments"].get_ref<std::string&>() += piece.arguments;
}

}  // namespace

std::string limited_by(const GenerationEvent& event) {
  return event.limit == LengthLimit::kMaxTokens ? "" : length_limit_name(event.limit);
}

Answer::Answer(const Call& call, std::string id, std::string model_name, std::int64_t created,
               const Engine& engine)
    : chat_(call.chat),
      include_usage_(call.include_usage),
      logprobs_(call.logprobs),
      prompt_logprobs_(call.prompt_logprobs),
      echo_(call.echo),
      include_reasoning_(call.include_reasoning),
      n_(call.n),
      num_continuations_(call.num_continuations),
      echoed_(call.echoed),
      id_(std::move(id)),
      model_name_(std::move(model_name)),
      created_(created),
      engine_(engine),
      choices_(static_cast<std::size_t>(call.num_choices)) {
  if (!chat_) return;
  for (std::size_t i = 0; i < choices_.size(); ++i) {
    Choice& choice = choices_[i];
    choice.output.emplace(call.output, fmt::format("call_{}-{}-", id_.substr(id_.find('-') + 1), i));
    choice.reasoning_tokens.emplace(call.output.reasoning, call.output.also_ends_reasoning);
  }
}

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
          {"prompt_tokens_details", {{"cached_tokens", usage_.cached_tokens}}},
          {"completion_tokens_details", {{"reasoning_tokens", reasoning_tokens_}}}};
}

// What comes in front of a choice's first event.
void Answer::begin(int index, GenerationEvent& e) {
  Choice& choice = choices_[static_cast<std::size_t>(index)];
  if (!choice.begun && prompt_logprobs_) choice.prompt_logprobs = prompt_logprobs_json(e);
  if (!choice.begun && echo_) {
    e.text.insert(0, echoed_[static_cast<std::size_t>(index / num_continuations_)]);
    e.logprobs.insert(e.logprobs.begin(), e.prompt_logprobs.begin(), e.prompt_logprobs.end());
  }
}

// By token, as vLLM writes them.
Json Answer::prompt_logprobs_json(const GenerationEvent& e) const {
  Json out = Json::array();
  for (const TokenLogprobs& l : e.prompt_logprobs) {
    if (l.rank == 0) {
      out.push_back(nullptr);
      continue;
    }
    Json one = Json::object();
    const auto add = [&](const TokenLogprob& t, std::int32_t rank) {
      one[std::to_string(t.token)] = {
          {"logprob", t.logprob}, {"rank", rank}, {"decoded_token", engine_.token_bytes(t.token)}};
    };
    add(l.chosen, l.rank);
    for (std::size_t i = 0; i < l.top.size(); ++i) {
      if (l.top[i].token != l.chosen.token) add(l.top[i], static_cast<std::int32_t>(i) + 1);
    }
    out.push_back(one);
  }
  return out;
}

Json Answer::chat_logprobs(std::span<const TokenLogprobs> logprobs) const {
  const auto entry = [&](const TokenLogprob& t) {
    const std::string bytes = engine_.token_bytes(t.token);
    Json values = Json::array();
    for (const char c : bytes) values.push_back(static_cast<unsigned char>(c));
    return Json{{"token", bytes}, {"logprob", t.logprob}, {"bytes", values}};
  };
  Json content = Json::array();
  for (const TokenLogprobs& l : logprobs) {
    Json one = entry(l.chosen);
    one["top_logprobs"] = Json::array();
    for (const TokenLogprob& t : l.top) one["top_logprobs"].push_back(entry(t));
    content.push_back(one);
  }
  return {{"content", content}};
}

// Tokens as text; bytes that are no text on their own become U+FFFD when the JSON is written.
Json Answer::logprobs_json(Choice& choice, const GenerationEvent& e) const {
  if (!logprobs_) return nullptr;
  if (chat_) return chat_logprobs(e.logprobs);
  Json out = {{"tokens", Json::array()},
              {"token_logprobs", Json::array()},
              {"top_logprobs", Json::array()},
              {"text_offset", Json::array()}};
  for (const TokenLogprobs& l : e.logprobs) {
    const std::string bytes = engine_.token_bytes(l.chosen.token);
    out["tokens"].push_back(bytes);
    out["text_offset"].push_back(choice.num_characters);
    if (l.rank == 0) {  // a prompt's first token
      out["token_logprobs"].push_back(nullptr);
      out["top_logprobs"].push_back(nullptr);
    } else {
      out["token_logprobs"].push_back(l.chosen.logprob);
      Json top = Json::object();
      // Of two with the same text the likelier.
      for (const TokenLogprob& t : l.top) top.emplace(engine_.token_bytes(t.token), t.logprob);
      out["top_logprobs"].push_back(top);
    }
    if (engine_.is_special_token(l.chosen.token)) continue;
    choice.num_characters += std::ranges::count_if(bytes, [](char c) { return (c & 0xC0) != 0x80; });
  }
  return out;
}

// What an event's text says, and the tokens of it that are reasoning. One
// that can only be followed by what nobody sees ends its choice.
ChatPiece Answer::take(Choice& choice, GenerationEvent& e) {
  const std::int64_t before = choice.reasoning_tokens->count();
  for (const std::int32_t token : e.token_ids) choice.reasoning_tokens->push(engine_.token_bytes(token));
  reasoning_tokens_ += choice.reasoning_tokens->count() - before;
  ChatPiece out = choice.output->push(e.text);
  if (choice.output->done() && e.finish == FinishReason::kNone) e.finish = FinishReason::kStop;
  if (e.finish != FinishReason::kNone) {
    ChatPiece end = choice.output->finish();
    out.reasoning += end.reasoning;
    out.content += end.content;
    for (ToolCallPiece& piece : end.calls) out.calls.push_back(std::move(piece));
  }
  if (!include_reasoning_) out.reasoning.clear();
  return out;
}

std::string Answer::finish_reason(const Choice& choice, const GenerationEvent& e) {
  const bool calls = choice.output && choice.output->calls_tools() && e.finish == FinishReason::kStop;
  return calls ? "tool_calls" : finish_reason_name(e.finish);
}

std::optional<Json> Answer::chunk(int index, GenerationEvent e) {
  begin(index, e);
  Choice& choice = choices_[static_cast<std::size_t>(index)];
  Json one = {{"index", index}};
  const ChatPiece piece = chat_ ? take(choice, e) : ChatPiece();
  choice.over = e.finish != FinishReason::kNone;
  count(e);
  if (chat_) {
    Json delta = Json::object();
    if (!choice.begun) delta["role"] = "assistant";
    if (!piece.reasoning.empty()) {
      delta["reasoning_content"] = piece.reasoning;
      delta["reasoning"] = piece.reasoning;
    }
    if (!piece.content.empty() || (!choice.begun && piece.empty())) delta["content"] = piece.content;
    for (const ToolCallPiece& call : piece.calls) delta["tool_calls"].push_back(delta_of(call));
    const bool news = !delta.empty() || e.finish != FinishReason::kNone || !e.logprobs.empty();
    if (!news) return std::nullopt;
    one["delta"] = std::move(delta);
  } else {
    one["text"] = e.text;
  }
  if (!choice.begun && prompt_logprobs_ && !chat_) one["prompt_logprobs"] = choice.prompt_logprobs;
  one["logprobs"] = e.logprobs.empty() ? Json() : logprobs_json(choice, e);
  one["finish_reason"] = e.finish == FinishReason::kNone ? Json() : Json(finish_reason(choice, e));
  if (const std::string limit = limited_by(e); !limit.empty()) one["limited_by"] = limit;
  Json out = head(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = Json::array({one});
  if (!choice.begun && prompt_logprobs_ && chat_) out["prompt_logprobs"] = choice.prompt_logprobs;
  choice.begun = true;
  if (include_usage_) out["usage"] = nullptr;
  return out;
}

Json Answer::usage_chunk() const {
  Json out = head(chat_ ? "chat.completion.chunk" : "text_completion");
  out["choices"] = Json::array();
  out["usage"] = usage();
  return out;
}

void Answer::collect(int index, GenerationEvent e) {
  Choice& choice = choices_[static_cast<std::size_t>(index)];
  for (const TokenLogprobs& l : e.logprobs) choice.sum_logprobs += l.chosen.logprob;
  choice.num_tokens += static_cast<std::int64_t>(e.token_ids.size());
  begin(index, e);
  choice.begun = true;
  const ChatPiece piece = chat_ ? take(choice, e) : ChatPiece();
  choice.over = e.finish != FinishReason::kNone;
  count(e);
  if (chat_) {
    choice.text += piece.content;
    choice.reasoning += piece.reasoning;
    for (const ToolCallPiece& call : piece.calls) collect_call(call, choice.tool_calls);
  } else {
    choice.text += e.text;
  }
  if (e.finish != FinishReason::kNone) choice.finish_reason = finish_reason(choice, e);
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

// The choices that are answered, of each prompt the best first where there are more than that.
std::vector<std::size_t> Answer::best() const {
  std::vector<std::size_t> all(choices_.size());
  std::iota(all.begin(), all.end(), 0);
  if (n_ == num_continuations_) return all;
  const auto mean = [&](std::size_t i) {
    const Choice& c = choices_[i];
    return c.num_tokens == 0 ? 0 : c.sum_logprobs / static_cast<double>(c.num_tokens);
  };
  std::vector<std::size_t> out;
  for (auto first = all.begin(); first != all.end(); first += num_continuations_) {
    std::stable_sort(first, first + num_continuations_,
                     [&](std::size_t a, std::size_t b) { return mean(a) > mean(b); });
    out.insert(out.end(), first, first + n_);
  }
  return out;
}

Json Answer::message(const Choice& choice) {
  const bool only_calls = choice.text.empty() && !choice.tool_calls.empty();
  Json out = {{"role", "assistant"}, {"content", only_calls ? Json() : Json(choice.text)}};
  if (!choice.reasoning.empty()) {
    out["reasoning_content"] = choice.reasoning;
    out["reasoning"] = choice.reasoning;
  }
  if (!choice.tool_calls.empty()) out["tool_calls"] = choice.tool_calls;
  return out;
}

Json Answer::complete() const {
  if (!error_.empty()) throw ApiError(500, "server_error", error_);
  Json out = head(chat_ ? "chat.completion" : "text_completion");
  out["choices"] = Json::array();
  for (const std::size_t i : best()) {
    const Choice& choice = choices_[i];
    Json one = {{"index", out["choices"].size()}};
    if (chat_) {
      one["message"] = message(choice);
    } else {
      one["text"] = choice.text;
    }
    one["logprobs"] = choice.logprobs.value_or(Json());
    if (prompt_logprobs_ && !chat_) one["prompt_logprobs"] = choice.prompt_logprobs;
    one["finish_reason"] = choice.finish_reason;
    if (!choice.limited_by.empty()) one["limited_by"] = choice.limited_by;
    out["choices"].push_back(one);
  }
  if (prompt_logprobs_ && chat_) out["prompt_logprobs"] = choices_.front().prompt_logprobs;
  out["usage"] = usage();
  return out;
}

}  // namespace flash_mla::server
