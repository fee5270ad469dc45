// Arbitrary bytes as what a client sends: a head; and a target, an Authorization header and a request id, a
// line each, then a body. A call that is accepted must be within the server's limits; what is refused must be an error
// in OpenAI's shape with a status of the client's fault; no line of the log may end early.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "server/call.h"
#include "server/dialect.h"
#include "server/headers.h"
#include "server/http_head.h"
#include "server/limits.h"
#include "server/origin.h"
#include "server/request_log.h"
#include "server/response_store.h"

namespace {

using namespace flash_mla::server;

void require(bool condition) {
  if (!condition) std::abort();
}

std::string_view take_line(std::string_view& text) {
  const std::size_t end = std::min(text.find('\n'), text.size());
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  return line;
}

// Returns what a client would be told.
template <typename Parse>
std::string error_of(const Parse& parse) {
  try {
    parse();
    return {};
  } catch (const ApiError& e) {
    require(e.status() >= 400 && e.status() < 500);
    const Json error = Json::parse(e.body().dump(-1, ' ', false, Json::error_handler_t::replace)).at("error");
    require(error.size() == 4 && !error.at("message").get<std::string>().empty());
    return e.what();
  }
}

void check_call(const Call& call) {
  require(call.num_choices >= 1 && call.num_choices <= kMaxChoices);
  require(!call.requests.empty() && call.requests.size() <= std::size_t{kMaxChoices});
  require(call.unknown_fields.size() <= kMaxUnknownFields);
  for (const flash_mla::Request& r : call.requests) {
    flash_mla::validate(r.sampling);
    require(r.sampling.stop.size() <= kMaxStops && r.sampling.stop_token_ids.size() <= kMaxStops);
    require(r.messages.size() <= kMaxMessages);
    require(!r.allow_special || r.prompt.empty());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto printable = [](char c) { return c > ' ' && c < '\x7f' && c != '"' && c != '\\'; };
  for (const char c : head_error(text)) require(printable(c) || c == ' ' || c == '"' || c == '\\');

  RequestRecord record;
  const std::string_view target = take_line(text);
  record.path = std::string(path_of(target));
  require(target.starts_with(record.path) && record.path.find('?') == record.path.npos);

  const std::string_view key = bearer_key(take_line(text));
  require(is_known_key(key, {"a key", "k"}) == (key == "a key" || key == "k"));

  // Nothing is let in that ends with a stranger's name.
  require(!is_allowed_host(std::string(key) + ".evil.example", {"a.b"}, /*loopback=*/true) ||
          key.starts_with('[') || key.find(':') != key.npos);
  require(!is_allowed_origin(key, {"https://a.b"}) || key.size() == 11);
  const std::string_view given = take_line(text);
  record.id = request_id(given);
  require(!record.id.empty() && record.id.size() <= 128);
  require(std::all_of(record.id.begin(), record.id.end(), printable));

  record.error += error_of([&] { check_call(parse_call(text, /*chat=*/false, {"small"})); });
  record.error += error_of([&] { check_call(parse_call(text, /*chat=*/true, {"small"})); });
  record.error += error_of([&] { parse_tokenize(text); });
  record.error += error_of([&] {
    for (const std::int32_t id : parse_detokenize(text, 100).tokens) require(id >= 0 && id < 100);
  });
  // What the other APIs' bodies become is a chat's body, or is refused.
  static ResponseStore store;
  const auto translated = [&](const auto& read) {
    record.error += error_of([&] {
      const std::string chat = read();
      record.error += error_of([&] { check_call(parse_call(chat, /*chat=*/true, {"small"})); });
    });
  };
  translated([&] { return responses_dialect(text, store)->take_chat_body(); });
  translated([&] { return messages_dialect(text)->take_chat_body(); });
  translated([&] { return messages_to_count(text); });
  const std::string line = log_line(record);
  require(line.find('\n') == line.size() - 1);
  require(Json::parse(line).at("request_id") == record.id);
  return 0;
}
