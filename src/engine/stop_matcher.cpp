#include "engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace flash_mla::engine {
namespace {

// Length of the longest end of `text` that is the beginning of `stop`, but not all of it.
std::size_t overlap(std::string_view text, std::string_view stop) {
  for (std::size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.ends_with(stop.substr(0, n))) return n;
  }
  return 0;
}

}  // namespace

std::string StopMatcher::push(std::string_view text) {
  if (stopped_) return {};
  held_ += text;
  // First by end, then by beginning: what a text ends at must not depend on the pieces it came in.
  std::size_t begin = 0, end = std::string::npos;
  std::size_t undecided = 0;
  for (const std::string& stop : stops_) {
    undecided = std::max(undecided, overlap(held_, stop));
    const std::size_t at = held_.find(stop);
    if (at == std::string::npos) continue;
    if (std::pair(at + stop.size(), at) < std::pair(end, begin)) {
      begin = at;
      end = at + stop.size();
    }
  }
  stopped_ = end != std::string::npos;
  if (stopped_) {
    std::string out = held_.substr(0, include_stop_ ? end : begin);
    held_.clear();
    return out;
  }
  std::string out = held_.substr(0, held_.size() - undecided);
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::flush() { return std::exchange(held_, {}); }

}  // namespace flash_mla::engine
