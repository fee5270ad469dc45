#include "server/reasoning.h"

#include <array>

#include "server/markers.h"

namespace flash_mla::server {
namespace {

constexpr std::string_view kOpen = "<think>", kClose = "</think>";

}  // namespace

ReasoningSplitter::ReasoningSplitter(Begin begin, std::string_view also_ends)
    : state_(begin == Begin::kUndecided   ? State::kUndecided
             : begin == Begin::kReasoning ? State::kReasoningBegins
                                          : State::kContent),
      also_ends_(also_ends) {}

ReasoningSplitter::Parts ReasoningSplitter::push(std::string_view text) {
  held_ += text;
  Parts out;
  while (step(out)) {
  }
  return out;
}

ReasoningSplitter::Parts ReasoningSplitter::finish() {
  Parts out;
  (in_reasoning() ? out.reasoning : out.content) = held_;
  held_.clear();
  return out;
}

// Whether there is more to do with what is held.
bool ReasoningSplitter::step(Parts& out) {
  switch (state_) {
    case State::kUndecided:
      return begin();
    case State::kReasoningBegins:
      return begin_reasoning();
    case State::kReasoning:
      return reason(out);
    case State::kContentBegins:
      held_.erase(0, std::min(held_.find_first_not_of('\n'), held_.size()));
      if (held_.empty()) return false;
      state_ = State::kContent;
      return true;
    case State::kContent:
      out.content += held_;
      held_.clear();
      return false;
  }
  return false;
}

bool ReasoningSplitter::begin() {
  const std::size_t space = std::min(held_.find_first_not_of(kWhiteSpace), held_.size());
  const std::string_view rest = std::string_view(held_).substr(space);
  if (space <= kMaxHeldSpace) {
    if (begins(rest, kOpen)) return false;
    if (rest.starts_with(kOpen)) {
      held_.erase(0, space + kOpen.size());
      state_ = State::kReasoningBegins;
      return true;
    }
  }
  state_ = State::kContent;
  return true;
}

// Some models write the tag that their prompt has already.
bool ReasoningSplitter::begin_reasoning() {
  held_.erase(0, std::min(held_.find_first_not_of('\n'), held_.size()));
  if (begins(held_, kOpen)) return false;
  if (held_.starts_with(kOpen)) {
    held_.erase(0, kOpen.size());
  } else {
    state_ = State::kReasoning;
  }
  return true;
}

bool ReasoningSplitter::reason(Parts& out) {
  const std::array<std::string_view, 2> ends = {kClose, also_ends_};
  const std::string_view text = held_;
  const FoundMarker end = find_marker(text, ends);
  std::size_t certain = end ? end.at : text.size() - undecided(text, ends);
  certain -= space_at_end(text.substr(0, certain), "\n");
  out.reasoning += text.substr(0, certain);
  if (!end) {
    held_.erase(0, certain);
    return false;
  }
  held_.erase(0, end.which == 0 ? end.at + kClose.size() : end.at);
  state_ = end.which == 0 ? State::kContentBegins : State::kContent;
  return true;
}

void ReasoningCounter::push(std::string_view bytes) {
  const bool before = splitter_.in_reasoning();
  splitter_.push(bytes);
  count_ += before && splitter_.in_reasoning();
}

}  // namespace flash_mla::server
