#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::engine {

/// Finds stop strings in text that arrives in pieces. Text that could be the beginning of a stop string is
/// held back until that is decided.
class StopMatcher {
 public:
  /// `include_stop`: the stop string itself is passed on.
  StopMatcher(std::vector<std::string> stops, bool include_stop)
      : stops_(std::move(stops)), include_stop_(include_stop) {}

  /// The text that is certain not to be part of a stop string. Of several stop strings the one that is
  /// complete first counts, of those that end together the longest.
  std::string push(std::string_view text);
  /// True once a stop string was found; further text is dropped.
  bool stopped() const { return stopped_; }
  /// What was held back: the text ends here.
  std::string flush();

 private:
  std::vector<std::string> stops_;
  bool include_stop_;
  bool stopped_ = false;
  std::string held_;
};

}  // namespace flash_mla::engine
