#pragma once

#include <string>
#include <string_view>
#include <vector>

// What this server itself reads out of a request's first lines. HTTP proper is Boost.Beast's.

namespace flash_mla::server {

/// The target without its query: that is the client's business, and stays out of the log.
std::string_view path_of(std::string_view target);

/// The key in an Authorization header: what follows "Bearer ", in any case, or all of it.
std::string_view bearer_key(std::string_view authorization);

/// Whether `given` is one of `keys`, in a time that does not tell where the first difference is.
bool is_known_key(std::string_view given, const std::vector<std::string>& keys);

/// The client's x-request-id if it is 1 to 128 letters, digits or "-_.:", else a new one that no other
/// request has, of this process or (as far as chance goes) another.
std::string request_id(std::string_view given);

}  // namespace flash_mla::server
