#pragma once

#include <string>
#include <string_view>

namespace flash_mla::server {

/// Why a request's head (its bytes up to and with the empty line) is refused, or "" if it may be parsed.
///
/// What two programs in a row may read differently lets one client slip a request into another's connection:
/// so a body's length is given once and in one way, by Content-Length in digits or by Transfer-Encoding that
/// is exactly `chunked` (HTTP/1.1 only); Host is given once (HTTP/1.0: at most once); a line ends with CR LF,
/// is not folded, and holds no control characters. Whoever is refused cannot use the connection any more.
std::string head_error(std::string_view head);

}  // namespace flash_mla::server
