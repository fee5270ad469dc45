#pragma once

#include <span>
#include <string_view>

namespace flash_mla::server {

/// Where a value stands in the text of a JSON object, by the names on the way to it; the last of several with the
/// same name. Empty if it is not found, as when a name is written with escapes. `text` must be valid JSON.
std::string_view raw_value(std::string_view text, std::span<const std::string_view> path);

}  // namespace flash_mla::server
