#pragma once

#include <string>
#include <string_view>
#include <vector>

// Who may call, by the names that a browser sends along: its Host and its Origin fields.

namespace flash_mla::server {

/// Whether a request with this Host field (name or address, with or without a port) is for this server. A page
/// whose name its owner lets resolve to this machine (DNS rebinding) would else read answers as its own: the
/// browser still sends the page's name.
///
/// Addresses and localhost are always right: no name was resolved, or none of a stranger's. `allowed` are
/// further names, without a port; "*.example.com" is all names below example.com, "*" any name. An empty list
/// is any name where `loopback` is false, and else those without a dot, which nobody can register.
bool is_allowed_host(std::string_view host, const std::vector<std::string>& allowed, bool loopback);

/// Whether pages of this origin may read answers: one of `allowed`, or any if that holds "*".
bool is_allowed_origin(std::string_view origin, const std::vector<std::string>& allowed);

/// Throw InvalidArgument, which names the flag, for a name that no request could have.
void check_allowed_host(std::string_view name);
void check_cors_origin(std::string_view origin);

/// Whether every letter may stand in the name of a header field (RFC 9110's tokens), commas and spaces
/// between names included.
bool is_list_of_names(std::string_view text);

}  // namespace flash_mla::server
