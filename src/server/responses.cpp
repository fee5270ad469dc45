#include <fmt/format.h>

#include <chrono>
#include <optional>
#include <utility>
#include <vector>

#include "server/response_store.h"
#include "server/responses_request.h"

// OpenAI's Responses API: items instead of choices, and an event for every step of an item's life.

namespace flash_mla::server {
namespace {

struct Item {
  enum class Kind { kReasoning, kMessage, kCall } kind;
  std::string id, text;  // a call's text are its arguments
  std::string call_id, name;
};

Json usage_json(const Json& usage) {
  const auto of = [&](const char* group, const char* key) {
    return usage.contains(group) ? usage[group].value(key, std::int64_t{0}) : std::int64_t{0};
  };
  return {
      {"input_tokens", usage["prompt_tokens"]},
      {"input_tokens_details", {{"cached_tokens", of("prompt_tokens_details", "cached_tokens")}}},
      {"output_tokens", usage["completion_tokens"]},
      {"output_tokens_details", {{"reasoning_tokens", of("completion_tokens_details", "reasoning_tokens")}}},
      {"total_tokens", usage["total_tokens"]}};
}

Json part_json(const Item& item, const std::string& text) {
  if (item.kind == Item::Kind::kReasoning) return {{"type", "reasoning_text"}, {"text", text}};
  return {
      {"type", "output_text"}, {"annotations", Json::array()}, {"logprobs", Json::array()}, {"text", text}};
}

Json item_json(const Item& item, const char* status) {
  const bool begun = std::string_view(status) == "in_progress";
  const Json parts = begun ? Json::array() : Json::array({part_json(item, item.text)});
  switch (item.kind) {
    case Item::Kind::kReasoning:
      return {{"id", item.id},
              {"type", "reasoning"},
              {"status", status},
              {"summary", Json::array()},
              {"content", parts}};
    case Item::Kind::kMessage:
      return {{"id", item.id},
              {"type", "message"},
              {"status", status},
              {"role", "assistant"},
              {"content", parts}};
    case Item::Kind::kCall:
      break;
  }
  return {{"id", item.id},     {"type", "function_call"},
          {"status", status},  {"call_id", item.call_id},
          {"name", item.name}, {"arguments", begun ? std::string() : item.text}};
}

class Responses : public Dialect {
 public:
  Responses(std::string_view body, ResponseStore& store)
      : request_(read_responses_request(body, store)), store_(store), chat_(request_.chat.dump()) {
    request_.chat = nullptr;
    request_.asked.erase("input");  // what is answered repeats all but this
    if (!request_.store) request_.messages = nullptr;
  }

  std::string take_chat_body() override { return std::move(chat_); }
  Json whole(const Json& completion) override;
  std::string begin() override;
  std::string chunk(const Json& chunk, const Usage& usage) override;
  std::string end(const Json& last) override;
  std::string failed(const ApiError& error) override;

 private:
  Json response(const char* status) const;
  std::string event(const char* name, Json data);
  Item& open(Item::Kind kind, std::string& out);
  void close(std::string& out);
  std::string finish(const Json& usage);
  void keep() const;
  const char* status() const { return limited_ ? "incomplete" : "completed"; }

  ResponsesRequest request_;
  ResponseStore& store_;
  std::string chat_;
  std::string id_ = new_id("resp_"), model_;
  std::int64_t created_ =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
          .count();
  std::vector<Item> items_;
  bool open_ = false;     // the last item goes on
  bool limited_ = false;  // the answer ended by its length
  Json usage_, error_;
  std::int64_t sequence_number_ = 0;
};

/// The response as far as it has come.
Json Responses::response(const char* status) const {
  const auto given = [&](const char* key, Json otherwise) {
    const Json* value = find(request_.asked, key);
    return value == nullptr ? otherwise : *value;
  };
  Json output = Json::array();
  const bool over = std::string_view(status) != "in_progress";
  for (const Item& item : items_) output.push_back(item_json(item, over ? status : "completed"));
  if (over && std::string_view(status) == "failed") {
    for (Json& item : output) item["status"] = "incomplete";
  }
  return {{"id", id_},
          {"object", "response"},
          {"created_at", created_},
          {"status", status},
          {"background", false},
          {"error", error_},
          {"incomplete_details", limited_ ? Json{{"reason", "max_output_tokens"}} : Json()},
          {"instructions", given("instructions", nullptr)},
          {"max_output_tokens", given("max_output_tokens", nullptr)},
          {"model", model_.empty() ? given("model", "") : Json(model_)},
          {"output", output},
          {"parallel_tool_calls", given("parallel_tool_calls", true)},
          {"previous_response_id", given("previous_response_id", nullptr)},
          {"reasoning", given("reasoning", {{"effort", nullptr}, {"summary", nullptr}})},
          {"store", request_.store},
          {"temperature", given("temperature", nullptr)},
          {"text", given("text", {{"format", {{"type", "text"}}}})},
          {"tool_choice", given("tool_choice", "auto")},
          {"tools", given("tools", Json::array())},
          {"top_p", given("top_p", nullptr)},
          {"truncation", "disabled"},
          {"usage", usage_},
          {"user", given("user", nullptr)},
          {"metadata", given("metadata", Json::object())}};
}

std::string Responses::event(const char* name, Json data) {
  Json out = {{"type", name}, {"sequence_number", sequence_number_++}};
  out.update(data);
  return sent_event(name, out);
}

std::string Responses::begin() {
  std::string out = event("response.created", {{"response", response("in_progress")}});
  out += event("response.in_progress", {{"response", response("in_progress")}});
  return out;
}

/// The item of that kind that goes on, or a new one. Calls are always new.
Item& Responses::open(Item::Kind kind, std::string& out) {
  if (open_ && kind != Item::Kind::kCall && items_.back().kind == kind) return items_.back();
  close(out);
  const char* prefix = kind == Item::Kind::kReasoning ? "rs_" : kind == Item::Kind::kMessage ? "msg_" : "fc_";
  items_.push_back({kind, new_id(prefix), {}, {}, {}});
  open_ = true;
  return items_.back();
}

void Responses::close(std::string& out) {
  if (!open_) return;
  open_ = false;
  const Item& item = items_.back();
  const std::size_t index = items_.size() - 1;
  if (item.kind == Item::Kind::kCall) {
    out +=
        event("response.function_call_arguments.done",
              {{"item_id", item.id}, {"output_index", index}, {"name", item.name}, {"arguments", item.text}});
  } else {
    Json done = {{"item_id", item.id}, {"output_index", index}, {"content_index", 0}};
    Json part = done;
    done["text"] = item.text;
    part["part"] = part_json(item, item.text);
    const bool reasoning = item.kind == Item::Kind::kReasoning;
    if (!reasoning) done["logprobs"] = Json::array();
    out += event(reasoning ? "response.reasoning_text.done" : "response.output_text.done", done);
    out += event("response.content_part.done", part);
  }
  out += event("response.output_item.done", {{"output_index", index}, {"item", item_json(item, status())}});
}

std::string Responses::chunk(const Json& chunk, const Usage&) {
  std::string out;
  model_ = chunk["model"].get<std::string>();
  const Json& choice = chunk["choices"][0];
  const Json& delta = choice["delta"];
  if (choice["finish_reason"] == "length") limited_ = true;
  const auto text = [&](Item::Kind kind, const char* event_name, const Json& more) {
    const std::size_t before = items_.size();
    Item& item = open(kind, out);
    const Json place = {{"item_id", item.id}, {"output_index", items_.size() - 1}, {"content_index", 0}};
    if (items_.size() > before) {
      out += event("response.output_item.added",
                   {{"output_index", items_.size() - 1}, {"item", item_json(item, "in_progress")}});
      Json added = place;
      added["part"] = part_json(item, "");
      out += event("response.content_part.added", added);
    }
    item.text += more.get<std::string>();
    Json said = place;
    said["delta"] = more;
    if (kind == Item::Kind::kMessage) said["logprobs"] = Json::array();
    out += event(event_name, said);
  };
  const auto has_text = [&](const char* key) {
    const Json* value = find(delta, key);
    return value != nullptr && *value != "";
  };
  if (has_text("reasoning_content")) {
    text(Item::Kind::kReasoning, "response.reasoning_text.delta", delta["reasoning_content"]);
  }
  if (has_text("content")) text(Item::Kind::kMessage, "response.output_text.delta", delta["content"]);
  if (const Json* calls = find(delta, "tool_calls")) {
    for (const Json& call : *calls) {
      if (call.contains("id")) {
        Item& item = open(Item::Kind::kCall, out);
        item.call_id = call["id"].get<std::string>();
        item.name = call["function"]["name"].get<std::string>();
        out += event("response.output_item.added",
                     {{"output_index", items_.size() - 1}, {"item", item_json(item, "in_progress")}});
      }
      Item& item = items_.back();
      const std::string more = call["function"].value("arguments", "");
      if (more.empty()) continue;
      item.text += more;
      out += event("response.function_call_arguments.delta",
                   {{"item_id", item.id}, {"output_index", items_.size() - 1}, {"delta", more}});
    }
  }
  return out;
}

std::string Responses::end(const Json& last) {
  std::string out;
  if (items_.empty()) {  // the model had nothing to say
    const Item& item = open(Item::Kind::kMessage, out);
    out +=
        event("response.output_item.added", {{"output_index", 0}, {"item", item_json(item, "in_progress")}});
    out += event(
        "response.content_part.added",
        {{"item_id", item.id}, {"output_index", 0}, {"content_index", 0}, {"part", part_json(item, "")}});
  }
  close(out);
  usage_ = usage_json(last["usage"]);
  keep();
  out += event(limited_ ? "response.incomplete" : "response.completed", {{"response", response(status())}});
  return out;
}

std::string Responses::failed(const ApiError& e) {
  error_ = {{"code", e.status() == 504 ? "request_timeout" : "server_error"}, {"message", e.what()}};
  open_ = false;
  return event("response.failed", {{"response", response("failed")}});
}

Json Responses::whole(const Json& completion) {
  model_ = completion["model"].get<std::string>();
  const Json& choice = completion["choices"][0];
  const Json& message = choice["message"];
  limited_ = choice["finish_reason"] == "length";
  if (const Json* reasoning = find(message, "reasoning_content"); reasoning != nullptr && *reasoning != "") {
    items_.push_back({Item::Kind::kReasoning, new_id("rs_"), reasoning->get<std::string>(), {}, {}});
  }
  const Json* calls = find(message, "tool_calls");
  const Json* content = find(message, "content");
  const std::string text = content == nullptr ? std::string() : content->get<std::string>();
  if (!text.empty() || calls == nullptr || calls->empty()) {
    items_.push_back({Item::Kind::kMessage, new_id("msg_"), text, {}, {}});
  }
  if (calls != nullptr) {
    for (const Json& call : *calls) {
      const Json& function = call["function"];
      items_.push_back({Item::Kind::kCall, new_id("fc_"), function["arguments"].get<std::string>(),
                        call["id"].get<std::string>(), function["name"].get<std::string>()});
    }
  }
  usage_ = usage_json(completion["usage"]);
  keep();
  return response(status());
}

/// Keeps the conversation with its answer, for who goes on with it.
void Responses::keep() const {
  if (!request_.store) return;
  Json messages = request_.messages;
  Json answer = {{"role", "assistant"}, {"content", ""}};
  for (const Item& item : items_) {
    if (item.kind == Item::Kind::kMessage) {
      answer["content"] = answer["content"].get<std::string>() + item.text;
    } else if (item.kind == Item::Kind::kCall) {
      answer["tool_calls"].push_back({{"id", item.call_id},
                                      {"type", "function"},
                                      {"function", {{"name", item.name}, {"arguments", item.text}}}});
    }
  }
  messages.push_back(std::move(answer));
  store_.put(id_, dump(messages));
}

}  // namespace

std::unique_ptr<Dialect> responses_dialect(std::string_view body, ResponseStore& store) {
  return std::make_unique<Responses>(body, store);
}

}  // namespace flash_mla::server
