#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "flash_mla/engine.h"

namespace flash_mla::server {

/// What became of one HTTP request.
struct RequestRecord {
  std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
  std::string id;
  std::string method = "-", path = "-";  ///< "-" where the request could not be read
  int status = 499;                      ///< 499: the client went away before it had its answer
  bool generates = false;                ///< the fields below mean something
  bool stream = false;
  int num_choices = 0;
  double first_event_seconds = -1;  ///< -1: there was none
  Usage usage;
  std::string limited_by;  ///< what ended a text besides max_tokens: "model", "cache" or ""
  std::string error;       ///< what the client was told
};

/// One line of JSON, with the end of line.
std::string log_line(const RequestRecord& record);

/// Says on stderr, as JSON, that clients send a field which has no effect; once for each name, and for at
/// most kMaxWarnings names. From any thread.
void warn_of_unknown_fields(const std::vector<std::string>& names);

}  // namespace flash_mla::server
