#include "server/api_error.h"

namespace flash_mla::server {

std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

ApiError bad_request(const std::string& message, std::string param) {
  return {400, "invalid_request_error", message, std::move(param)};
}

Json ApiError::body() const {
  const auto or_null = [](const std::string& s) { return s.empty() ? Json() : Json(s); };
  return {{"error",
           {{"message", what()}, {"type", type_}, {"param", or_null(param_)}, {"code", or_null(code_)}}}};
}

}  // namespace flash_mla::server
