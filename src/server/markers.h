#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string_view>

// Markers in text that arrives in pieces.

namespace flash_mla::server {

/// White space beside a marker belongs to the marker: this much of it is held back, or given up, at most.
inline constexpr std::size_t kMaxHeldSpace = 64;
inline constexpr std::string_view kWhiteSpace = " \n\r\t";

/// How many bytes at the end of `text` are the beginning of `marker`, but not all of it.
inline std::size_t beginning_at_end(std::string_view text, std::string_view marker) {
  if (marker.empty()) return 0;
  for (std::size_t n = std::min(text.size(), marker.size() - 1); n > 0; --n) {
    if (text.ends_with(marker.substr(0, n))) return n;
  }
  return 0;
}

/// Whether `text` is the beginning of `marker`, but not all of it.
inline bool begins(std::string_view text, std::string_view marker) {
  return text.size() < marker.size() && marker.starts_with(text);
}

/// The first of several markers in a text: where it begins (npos: nowhere), and which it is. Empty markers are
/// not looked for.
struct FoundMarker {
  std::size_t at = std::string_view::npos;
  std::size_t which = 0;
  explicit operator bool() const { return at != std::string_view::npos; }
};
inline FoundMarker find_marker(std::string_view text, std::span<const std::string_view> markers) {
  FoundMarker out;
  for (std::size_t i = 0; i < markers.size(); ++i) {
    const std::size_t at = markers[i].empty() ? text.npos : text.find(markers[i]);
    if (at < out.at) out = {at, i};
  }
  return out;
}

/// How many bytes at the end of `text` could be the beginning of one of the markers.
inline std::size_t undecided(std::string_view text, std::span<const std::string_view> markers) {
  std::size_t out = 0;
  for (const std::string_view marker : markers) out = std::max(out, beginning_at_end(text, marker));
  return out;
}

/// How many bytes of white space `text` ends with, at most kMaxHeldSpace.
inline std::size_t space_at_end(std::string_view text, std::string_view space = kWhiteSpace) {
  const std::size_t last = text.find_last_not_of(space);
  return std::min(kMaxHeldSpace, last == text.npos ? text.size() : text.size() - last - 1);
}

}  // namespace flash_mla::server
