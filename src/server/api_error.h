#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

namespace flash_mla::server {

using Json = nlohmann::ordered_json;  ///< what is written: fields in the order of OpenAI's documents
/// What clients send: looking up a field of an ordered_json walks over all of them, so that an object with a
/// million fields would take a thread for minutes.
using Body = nlohmann::json;

/// JSON as it is sent. Bytes that are no UTF-8 become U+FFFD.
std::string dump(const Json& json);

/// An answer other than success, in OpenAI's error shape.
class ApiError : public std::runtime_error {
 public:
  ApiError(int status, std::string type, const std::string& message, std::string param = {},
           std::string code = {})
      : std::runtime_error(message),
        status_(status),
        type_(std::move(type)),
        param_(std::move(param)),
        code_(std::move(code)) {}
  int status() const { return status_; }
  Json body() const;

 private:
  int status_;
  std::string type_, param_, code_;
};

/// 400, "invalid_request_error".
ApiError bad_request(const std::string& message, std::string param = {});

}  // namespace flash_mla::server
