#include <algorithm>
#include <utility>
#include <vector>

#include "server/messages_request.h"

// Anthropic's Messages API: an answer of blocks, each begun, continued and ended by events.

namespace flash_mla::server {
namespace {

class Messages : public Dialect {
 public:
  explicit Messages(std::string_view body)
      : request_(read_messages_request(body, /*counts=*/false)), chat_(request_.chat.dump()) {
    request_.chat = nullptr;
  }

  std::string take_chat_body() override { return std::move(chat_); }
  Json whole(const Json& completion) override;
  std::string chunk(const Json& chunk, const Usage& usage) override;
  std::string end(const Json& last) override;
  std::string failed(const ApiError& error) override {
    return sent_event("error", messages_error(error, {}));
  }

 private:
  std::string take_stop(std::string text, bool stopped);
  const char* stop_reason(const Json& choice) const;
  void open(const char* type, Json block, std::string& out);
  void close(std::string& out);

  MessagesRequest request_;
  std::string chat_, id_ = new_id("msg_");
  Json stop_sequence_, stop_reason_;
  bool begun_ = false;
  std::string block_;  // the type of the block that goes on; empty: none
  int num_blocks_ = 0;
};

// Cached tokens of the prompt are counted apart.
Json usage_json(const Usage& usage) {
  return {{"input_tokens", usage.prompt_tokens - usage.cached_tokens},
          {"cache_creation_input_tokens", 0},
          {"cache_read_input_tokens", usage.cached_tokens},
          {"output_tokens", usage.completion_tokens}};
}

Usage usage_of(const Json& usage) {
  const Json* details = find(usage, "prompt_tokens_details");
  return {usage["prompt_tokens"].get<std::int64_t>(),
          details == nullptr ? 0 : details->value("cached_tokens", std::int64_t{0}),
          usage["completion_tokens"].get<std::int64_t>()};
}

/// A text that has stopped without the stop sequence at its end, which is noted.
std::string Messages::take_stop(std::string text, bool stopped) {
  if (!stopped) return text;
  for (const std::string& stop : request_.stops) {
    if (!text.ends_with(stop)) continue;
    stop_sequence_ = stop;
    text.resize(text.size() - stop.size());
    break;
  }
  return text;
}

const char* Messages::stop_reason(const Json& choice) const {
  const Json& reason = choice["finish_reason"];
  if (reason == "tool_calls") return "tool_use";
  if (reason == "length")
    return choice.contains("limited_by") ? "model_context_window_exceeded" : "max_tokens";
  return stop_sequence_.is_null() ? "end_turn" : "stop_sequence";
}

Json call_input(const std::string& arguments) {
  Json input = Json::parse(arguments, nullptr, /*allow_exceptions=*/false);
  return input.is_object() ? input : Json::object();
}

Json Messages::whole(const Json& completion) {
  const Json& choice = completion["choices"][0];
  const Json& message = choice["message"];
  Json content = Json::array();
  if (const Json* reasoning = find(message, "reasoning_content"); reasoning != nullptr && *reasoning != "") {
    content.push_back({{"type", "thinking"}, {"thinking", *reasoning}, {"signature", ""}});
  }
  if (const Json* said = find(message, "content")) {
    const std::string text = take_stop(said->get<std::string>(), choice["finish_reason"] == "stop");
    if (!text.empty()) content.push_back({{"type", "text"}, {"text", text}, {"citations", nullptr}});
  }
  if (const Json* calls = find(message, "tool_calls")) {
    for (const Json& call : *calls) {
      content.push_back({{"type", "tool_use"},
                         {"id", call["id"]},
                         {"name", call["function"]["name"]},
                         {"input", call_input(call["function"]["arguments"].get<std::string>())}});
    }
  }
  return {{"id", id_},
          {"type", "message"},
          {"role", "assistant"},
          {"model", completion["model"]},
          {"content", content},
          {"stop_reason", stop_reason(choice)},
          {"stop_sequence", stop_sequence_},
          {"usage", usage_json(usage_of(completion["usage"]))}};
}

void Messages::open(const char* type, Json block, std::string& out) {
  if (block_ == type && block_ != "tool_use") return;
  close(out);
  block_ = type;
  Json start = {{"type", type}};
  start.update(block);
  out += sent_event("content_block_start",
                    {{"type", "content_block_start"}, {"index", num_blocks_}, {"content_block", start}});
}

void Messages::close(std::string& out) {
  if (block_.empty()) return;
  out += sent_event("content_block_stop", {{"type", "content_block_stop"}, {"index", num_blocks_++}});
  block_.clear();
}

std::string Messages::chunk(const Json& chunk, const Usage& usage) {
  std::string out;
  if (!begun_) {
    begun_ = true;
    out += sent_event("message_start", {{"type", "message_start"},
                                        {"message",
                                         {{"id", id_},
                                          {"type", "message"},
                                          {"role", "assistant"},
                                          {"model", chunk["model"]},
                                          {"content", Json::array()},
                                          {"stop_reason", nullptr},
                                          {"stop_sequence", nullptr},
                                          {"usage", usage_json(usage)}}}});
  }
  const auto say = [&](Json delta) {
    out += sent_event("content_block_delta",
                      {{"type", "content_block_delta"}, {"index", num_blocks_}, {"delta", std::move(delta)}});
  };
  const Json& choice = chunk["choices"][0];
  const Json& delta = choice["delta"];
  if (const Json* more = find(delta, "reasoning_content"); more != nullptr && *more != "") {
    open("thinking", {{"thinking", ""}, {"signature", ""}}, out);
    say({{"type", "thinking_delta"}, {"thinking", *more}});
  }
  if (const Json* more = find(delta, "content")) {
    const std::string text = take_stop(more->get<std::string>(), choice["finish_reason"] == "stop");
    if (!text.empty()) {
      open("text", {{"text", ""}}, out);
      say({{"type", "text_delta"}, {"text", text}});
    }
  }
  if (const Json* calls = find(delta, "tool_calls")) {
    for (const Json& call : *calls) {
      if (call.contains("id")) {
        open("tool_use", {{"id", call["id"]}, {"name", call["function"]["name"]}, {"input", Json::object()}},
             out);
      }
      const std::string more = call["function"].value("arguments", "");
      if (!more.empty()) say({{"type", "input_json_delta"}, {"partial_json", more}});
    }
  }
  if (!choice["finish_reason"].is_null()) stop_reason_ = stop_reason(choice);
  return out;
}

std::string Messages::end(const Json& last) {
  std::string out;
  close(out);
  out += sent_event("message_delta",
                    {{"type", "message_delta"},
                     {"delta", {{"stop_reason", stop_reason_}, {"stop_sequence", stop_sequence_}}},
                     {"usage", usage_json(usage_of(last["usage"]))}});
  return out + sent_event("message_stop", {{"type", "message_stop"}});
}

}  // namespace

std::unique_ptr<Dialect> messages_dialect(std::string_view body) { return std::make_unique<Messages>(body); }

std::string messages_to_count(std::string_view body) {
  return read_messages_request(body, /*counts=*/true).chat.dump();
}

Json messages_error(const ApiError& error, const std::string& request_id) {
  const auto type = [&] {
    switch (error.status()) {
      case 401:
        return "authentication_error";
      case 403:
        return "permission_error";
      case 404:
        return "not_found_error";
      case 413:
        return "request_too_large";
      case 429:
        return "rate_limit_error";
      case 503:
        return "overloaded_error";
      case 504:
        return "timeout_error";
      default:
        return error.status() >= 500 ? "api_error" : "invalid_request_error";
    }
  };
  Json out = {{"type", "error"}, {"error", {{"type", type()}, {"message", error.what()}}}};
  if (!request_id.empty()) out["request_id"] = request_id;
  return out;
}

}  // namespace flash_mla::server
