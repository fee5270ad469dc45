#include "server/routes.h"

#include <fmt/format.h>

#include <algorithm>

#include "flash_mla/error.h"
#include "flash_mla_status_page.h"
#include "server/call.h"
#include "server/chat_prompt.h"
#include "server/dialect.h"
#include "server/experts.h"
#include "server/headers.h"

namespace flash_mla::server {
namespace {

constexpr std::string_view kModelPath = "/v1/models/";

HttpResponse text(const Exchange& x, const char* type, std::string body) {
  HttpResponse response(http::status::ok, x.request.version());
  response.set(http::field::content_type, type);
  response.body() = std::move(body);
  return response;
}

HttpResponse health(const Exchange& x) { return json_response(x.request, 200, {{"status", "ok"}}); }

HttpResponse ready(const Exchange& x) {
  return x.shared.draining ? json_response(x.request, 503, {{"status", "draining"}})
                           : json_response(x.request, 200, {{"status", "ready"}});
}

HttpResponse metrics(const Exchange& x) {
  return text(x, "text/plain; version=0.0.4",
              prometheus_text(x.shared.engine.stats(), x.shared.http_stats()));
}

HttpResponse status_page(const Exchange& x) {
  HttpResponse page = text(x, "text/html; charset=utf-8", kStatusPage);
  page.set("content-security-policy",
           "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
           "img-src data:; "
           "frame-ancestors 'none'");
  return page;
}

HttpResponse trace(const Exchange& x) { return text(x, "application/json", x.shared.engine.chrome_trace()); }

HttpResponse experts(const Exchange& x) {
  try {
    return text(x, "application/json", experts_json(x.shared.engine.expert_counts()));
  } catch (const Unsupported& e) {
    throw ApiError(501, "not_implemented_error", e.what());
  }
}

HttpResponse version(const Exchange& x) {
  return json_response(x.request, 200, {{"version", x.shared.options.version}});
}

Json model_json(const Exchange& x, const std::string& name) {
  return {{"id", name},
          {"object", "model"},
          {"created", x.shared.created},
          {"owned_by", "flash_mla"},
          {"max_model_len", x.shared.engine.max_length()}};
}

HttpResponse models(const Exchange& x) {
  Json list = Json::array();
  for (const std::string& name : x.shared.options.model_names) list.push_back(model_json(x, name));
  return json_response(x.request, 200, {{"object", "list"}, {"data", list}});
}

HttpResponse model(const Exchange& x) {
  const std::string_view path = path_of(view(x.request.target()));
  return json_response(x.request, 200, model_json(x, std::string(path.substr(kModelPath.size()))));
}

HttpResponse tokenize(const Exchange& x) {
  const TokenizeCall call = parse_tokenize(x.request.body());
  try {
    const std::vector<std::int32_t> ids =
        x.shared.engine.tokenize(call.prompt, call.add_special_tokens, /*allow_special=*/false);
    return json_response(
        x.request, 200,
        {{"count", ids.size()}, {"max_model_len", x.shared.engine.max_length()}, {"tokens", ids}});
  } catch (const InvalidArgument& e) {
    throw bad_request(e.what(), "prompt");
  }
}

HttpResponse count_tokens(const Exchange& x) {
  Call call = parse_call(messages_to_count(x.request.body()), /*chat=*/true, x.shared.options.model_names);
  try {
    prepare_chat(x.shared.engine, x.shared.options, call);
    const std::size_t count = x.shared.engine.prompt_token_ids(call.requests.front()).size();
    return json_response(x.request, 200, {{"input_tokens", count}});
  } catch (const InvalidArgument& e) {
    throw bad_request(e.what(), "messages");
  } catch (const Unsupported& e) {
    throw bad_request(e.what(), "messages");
  }
}

HttpResponse detokenize(const Exchange& x) {
  const DetokenizeCall call = parse_detokenize(x.request.body(), x.shared.engine.vocab_size());
  return json_response(x.request, 200,
                       {{"prompt", x.shared.engine.detokenize(call.tokens, call.skip_special_tokens)}});
}

constexpr Route kRoutes[] = {
    {http::verb::get, /*open=*/true, "/health", health},
    {http::verb::get, /*open=*/true, "/ready", ready},
    {http::verb::get, /*open=*/true, "/metrics", metrics},
    {http::verb::get, /*open=*/true, "/version", version},
    {http::verb::get, /*open=*/true, "/", status_page},
    {http::verb::get, /*open=*/false, "/trace", trace},
    {http::verb::get, /*open=*/false, "/experts", experts},
    {http::verb::get, /*open=*/false, "/v1/models", models},
    {http::verb::get, /*open=*/false, kModelPath, model},
    {http::verb::post, /*open=*/false, "/v1/tokenize", tokenize},
    {http::verb::post, /*open=*/false, "/tokenize", tokenize},  // vLLM's name for it
    {http::verb::post, /*open=*/false, "/v1/detokenize", detokenize},
    {http::verb::post, /*open=*/false, "/detokenize", detokenize},
    {http::verb::post, /*open=*/false, "/v1/completions", nullptr, Route::Generates::kCompletion},
    {http::verb::post, /*open=*/false, "/v1/chat/completions", nullptr, Route::Generates::kChat},
    {http::verb::post, /*open=*/false, "/v1/responses", nullptr, Route::Generates::kResponses},
    {http::verb::post, /*open=*/false, "/v1/messages", nullptr, Route::Generates::kMessages},
    {http::verb::post, /*open=*/false, "/v1/messages/count_tokens", count_tokens},
};

bool leads(const Exchange& x, const Route& route) {
  const std::string_view path = path_of(view(x.request.target()));
  if (route.path.size() > 1 && route.path.ends_with('/')) {
    if (!path.starts_with(route.path)) return false;
    return std::ranges::find(x.shared.options.model_names, path.substr(route.path.size())) !=
           x.shared.options.model_names.end();
  }
  return path == route.path;
}

void authorise(const Exchange& x) {
  const std::vector<std::string>& keys = x.shared.options.api_keys;
  if (keys.empty()) return;
  if (is_known_key(bearer_key(view(x.request[http::field::authorization])), keys)) return;
  if (is_known_key(view(x.request["x-api-key"]), keys)) return;  // Anthropic's clients
  throw ApiError(401, "invalid_request_error", "the API key is missing or wrong", "", "invalid_api_key");
}

}  // namespace

const Route& find_route(const Exchange& x) {
  const http::verb method = x.request.method() == http::verb::head ? http::verb::get : x.request.method();
  const Route* found = nullptr;
  bool known = false;
  for (const Route& route : kRoutes) {
    if (!leads(x, route)) continue;
    known = true;
    if (route.method == method) found = &route;
  }
  if (found == nullptr || !found->open) authorise(x);
  if (found != nullptr) return *found;
  if (!known) throw ApiError(404, "invalid_request_error", "there is no such path");
  throw ApiError(405, "invalid_request_error",
                 fmt::format("{} is not a method of {}", std::string(x.request.method_string()),
                             path_of(view(x.request.target()))));
}

bool is_messages_path(const Exchange& x) {
  const std::string_view path = path_of(view(x.request.target()));
  return path == "/v1/messages" || path == "/v1/messages/count_tokens";
}

std::string allowed_methods(const Exchange& x) {
  std::string out;
  for (const Route& route : kRoutes) {
    if (!leads(x, route)) continue;
    if (!out.empty()) out += ", ";
    out += route.method == http::verb::get ? "GET, HEAD" : "POST";
  }
  return out;
}

}  // namespace flash_mla::server
