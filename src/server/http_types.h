#pragma once

// clang-format off
#include <utility>  // before Boost 1.74's asio/awaitable.hpp, which uses it without including it
// clang-format on

#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <string>
#include <string_view>

namespace flash_mla::server {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::awaitable;
using asio::redirect_error;
using asio::use_awaitable;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using std::chrono::seconds;

using HttpRequest = http::request<http::string_body>;
using HttpResponse = http::response<http::string_body>;
using TimePoint = std::chrono::steady_clock::time_point;

inline std::string_view view(boost::string_view text) { return {text.data(), text.size()}; }

}  // namespace flash_mla::server
