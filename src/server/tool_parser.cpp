#include "server/tool_parser.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <utility>

#include "server/markers.h"

namespace flash_mla::server {
namespace {

using Arguments = ToolSyntax::Arguments;

// Of a call's name or a parameter's, with what is written around it.
constexpr std::size_t kMaxHeader = 512;
constexpr std::size_t kSlice = 4096;
constexpr std::string_view kFence = "```", kEndOfKey = "</arg_key>", kBeginOfValue = "<arg_value>";

bool is_space(char c) { return kWhiteSpace.find(c) != kWhiteSpace.npos; }

}  // namespace

ToolParser::ToolParser(const ToolSyntax& syntax, std::shared_ptr<const ToolSchemas> schemas,
                       std::string id_prefix, bool parallel)
    : syntax_(syntax), schemas_(std::move(schemas)), id_prefix_(std::move(id_prefix)), parallel_(parallel) {}

ToolOutput ToolParser::push(std::string_view text) {
  // In slices: markers are looked for in all that is held.
  while (!text.empty()) {
    held_ += text.substr(0, kSlice);
    text.remove_prefix(std::min(kSlice, text.size()));
    while (step()) {
    }
    held_.erase(0, std::exchange(at_, 0));
  }
  return std::exchange(out_, {});
}

ToolOutput ToolParser::finish() {
  const std::string_view text = rest();
  const bool only_space = text.find_first_not_of(kWhiteSpace) == text.npos;
  switch (state_) {
    case State::kContent:
      if (!only_space || !behind_call_) say(text);
      break;
    case State::kSection:
    case State::kHeader:
      say(std::exchange(literal_, {}));
      if (!only_space || !behind_call_) say(text);
      break;
    case State::kJson:  // white space, and the beginning of what ends it
      break;
    case State::kParameters:
      if (!only_space || in_junk_) say(text);
      break;
    case State::kParameterHeader:
      say(syntax_.parameter_begin);
      say(text);
      break;
    case State::kBeforeValue:
      say(fmt::format("{}{}{}{}", syntax_.parameter_begin, key_, kEndOfKey, text));
      break;
    case State::kValue:
      if (types_ == ToolSchemas::kString) {
        append_escaped(text, value_);
        argue(value_);
      } else {
        argue(value_ + std::string(text));
      }
      break;
    case State::kDone:
      break;
  }
  held_.clear();
  at_ = 0;
  state_ = State::kDone;
  return std::exchange(out_, {});
}

void ToolParser::say(std::string_view text) {
  out_.content += text;
  behind_call_ = behind_call_ && text.empty();
}

bool ToolParser::step() {
  switch (state_) {
    case State::kContent:
      return content();
    case State::kSection:
      return section();
    case State::kHeader:
      return header();
    case State::kJson:
      return json();
    case State::kParameters:
      return parameters();
    case State::kParameterHeader:
      return parameter_header();
    case State::kBeforeValue:
      return before_value();
    case State::kValue:
      return value();
    case State::kDone:
      consume(rest().size());
      return false;
  }
  return false;
}

bool ToolParser::content() {
  const std::array<std::string_view, 3> markers = {
      syntax_.section_begin, syntax_.call_begin,
      calls_in_section_ ? syntax_.section_end : std::string_view()};
  const std::string_view text = rest();
  const FoundMarker found = find_marker(text, markers);
  const std::size_t before = found ? found.at : text.size() - undecided(text, markers);
  const std::size_t space = space_at_end(text.substr(0, before));
  say(text.substr(0, before - space));
  if (!found) {
    consume(before - space);
    return false;
  }
  const std::string_view marker = markers[found.which];
  if (found.which == 2) {
    calls_in_section_ = false;
  } else {
    literal_ = text.substr(before - space, space + marker.size());
    calls_in_section_ = found.which == 1 && calls_in_section_;
    state_ = found.which == 0 ? State::kSection : State::kHeader;
  }
  consume(found.at + marker.size());
  return true;
}

// Between the calls of a section.
bool ToolParser::section() {
  const std::string_view text = rest();
  const std::size_t space = std::min(text.find_first_not_of(kWhiteSpace), text.size());
  const std::string_view next = text.substr(space);
  if (space <= kMaxHeldSpace) {
    if (next.empty() || begins(next, syntax_.call_begin) || begins(next, syntax_.section_end)) return false;
    if (next.starts_with(syntax_.call_begin)) {
      if (!literal_.empty() || !calls_in_section_) literal_ += text.substr(0, space);
      literal_ += syntax_.call_begin;
      consume(space + syntax_.call_begin.size());
      state_ = State::kHeader;
      return true;
    }
    if (next.starts_with(syntax_.section_end) && calls_in_section_) {
      literal_.clear();
      consume(space + syntax_.section_end.size());
      calls_in_section_ = false;
      state_ = State::kContent;
      return true;
    }
  }
  say(std::exchange(literal_, {}));
  if (space > 0 && !calls_in_section_) {
    say(text.substr(0, space));
    consume(space);
  }
  if (next.starts_with(syntax_.section_end)) {  // of an empty section
    say(syntax_.section_end);
    consume(syntax_.section_end.size());
  }
  state_ = State::kContent;
  return true;
}

bool ToolParser::header() {
  const std::array<std::string_view, 3> stops = {
      syntax_.call_begin, syntax_.arguments == Arguments::kGlm ? std::string_view() : syntax_.call_end,
      syntax_.section_end};
  const std::array<std::string_view, 2> ends = {
      syntax_.header_end, syntax_.arguments == Arguments::kGlm ? syntax_.call_end : std::string_view()};
  const std::string_view text = rest().substr(0, kMaxHeader);
  const FoundMarker end = find_marker(text, ends), stop = find_marker(text, stops);
  if (!end && !stop && text.size() < kMaxHeader) return false;
  ToolHeader header;
  if (end && !(stop && stop.at < end.at)) header = read_tool_header(syntax_, text.substr(0, end.at));
  // GLM's calls without arguments could be any tag in a text.
  const bool bare = syntax_.arguments == Arguments::kGlm && end && end.which == 1;
  if (header.name.empty() || (bare && !schemas_->knows(header.name))) {
    give_up();
    return true;
  }
  // GLM's arguments begin with what ends the header.
  consume(end.at + (syntax_.arguments == Arguments::kGlm ? 0 : syntax_.header_end.size()));
  begin_call(std::move(header));
  return true;
}

void ToolParser::give_up() {
  say(std::exchange(literal_, {}));
  state_ = State::kContent;
}

void ToolParser::begin_call(ToolHeader header) {
  literal_.clear();
  calls_in_section_ = true;
  ToolCallPiece& piece = out_.calls.emplace_back();
  piece.index = num_calls_++;
  piece.id = header.id.empty() ? fmt::format("{}{}", id_prefix_, piece.index) : std::move(header.id);
  piece.name = header.name;
  tool_ = std::move(header.name);
  has_arguments_ = in_junk_ = in_string_ = escaped_ = false;
  state_ = syntax_.arguments == Arguments::kJson ? State::kJson : State::kParameters;
}

void ToolParser::end_call() {
  if (syntax_.arguments == Arguments::kJson) {
    if (!has_arguments_) argue("{}");
  } else {
    argue(has_arguments_ ? "}" : "{}");
  }
  behind_call_ = true;
  state_ = !parallel_ ? State::kDone : syntax_.section_begin.empty() ? State::kContent : State::kSection;
}

void ToolParser::argue(std::string_view arguments) {
  if (arguments.empty()) return;
  has_arguments_ = true;
  const int index = num_calls_ - 1;
  if (out_.calls.empty() || out_.calls.back().index != index) out_.calls.emplace_back().index = index;
  out_.calls.back().arguments += arguments;
}

// What stands behind the JSON of a call, if `text` begins with it; `size` of it is used up.
ToolParser::Match ToolParser::end_of_json(std::string_view text, std::size_t& size) const {
  size = 0;
  if (syntax_.format == ToolFormat::kDeepSeekV3) {
    if (begins(text, kFence)) return Match::kPartial;
    if (text.starts_with(kFence)) {
      size = std::min(text.find_first_not_of(kWhiteSpace, kFence.size()), text.size());
      if (size > kMaxHeldSpace) return Match::kNo;
      text.remove_prefix(size);
    }
  }
  if (text.starts_with(syntax_.call_end)) {
    size += syntax_.call_end.size();
    return Match::kYes;
  }
  // A call that was not ended.
  if (text.starts_with(syntax_.section_end) || text.starts_with(syntax_.call_begin)) return Match::kYes;
  const bool partial =
      begins(text, syntax_.call_end) || begins(text, syntax_.section_end) || begins(text, syntax_.call_begin);
  return partial ? Match::kPartial : Match::kNo;
}

// Passes JSON on, up to the marker that ends it: one within a string is part of that.
bool ToolParser::json() {
  const std::string_view text = rest();
  std::size_t begin = has_arguments_ ? 0 : std::min(text.find_first_not_of(kWhiteSpace), text.size());
  std::size_t certain = begin;
  for (std::size_t i = begin; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string_) {
      in_string_ = escaped_ || c != '"';
      escaped_ = !escaped_ && c == '\\';
    } else if (is_space(c)) {
      if (i - certain < kMaxHeldSpace) continue;
    } else if (c == '<' || c == '`') {  // never begin a JSON value
      std::size_t size = 0;
      const Match match = end_of_json(text.substr(i), size);
      if (match == Match::kPartial) break;
      if (match == Match::kYes) {
        argue(text.substr(begin, certain - begin));
        consume(i + size);
        end_call();
        return true;
      }
    } else {
      in_string_ = c == '"';
    }
    certain = i + 1;
  }
  argue(text.substr(begin, certain - begin));
  consume(certain);
  return false;
}

void ToolParser::skip_space() {
  const std::string_view text = rest();
  consume(std::min(text.find_first_not_of(kWhiteSpace), text.size()));
}

bool ToolParser::parameters() {
  if (!in_junk_) skip_space();
  const std::string_view text = rest();
  if (text.empty()) return false;
  if (text.starts_with(syntax_.parameter_begin)) {
    in_junk_ = false;
    consume(syntax_.parameter_begin.size());
    state_ = State::kParameterHeader;
    return true;
  }
  if (text.starts_with(syntax_.call_end)) {
    consume(syntax_.call_end.size());
    end_call();
    return true;
  }
  // A call that was not ended.
  if (text.starts_with(syntax_.call_begin) ||
      (!syntax_.section_end.empty() && text.starts_with(syntax_.section_end))) {
    end_call();
    return true;
  }
  for (const std::string_view marker :
       {syntax_.parameter_begin, syntax_.call_end, syntax_.call_begin, syntax_.section_end}) {
    if (begins(text, marker)) return false;
  }
  in_junk_ = true;
  const std::size_t size = std::min(text.find('<', 1), text.size());
  say(text.substr(0, size));
  consume(size);
  return true;
}

bool ToolParser::parameter_header() {
  const bool dsml = syntax_.arguments == Arguments::kDsml;
  const std::string_view end = dsml ? ">" : kEndOfKey;
  const std::string_view text = rest().substr(0, kMaxHeader);
  const std::size_t at = text.find(end);
  if (at == text.npos && text.size() < kMaxHeader) return false;
  const DsmlParameter parameter =
      dsml && at != text.npos ? read_dsml_parameter(text.substr(0, at)) : DsmlParameter();
  if (at == text.npos || (dsml && parameter.name.empty())) {
    say(syntax_.parameter_begin);
    in_junk_ = true;
    state_ = State::kParameters;
    return true;
  }
  using Kind = DsmlParameter::Kind;
  if (!dsml) {
    key_ = text.substr(0, at);
    state_ = State::kBeforeValue;
  } else if (parameter.kind == Kind::kUnsaid) {
    begin_value(parameter.name, schemas_->types(tool_, parameter.name));
  } else {
    begin_value(parameter.name, parameter.kind == Kind::kString ? ToolSchemas::kString
                                                                : ToolSchemas::kAny & ~ToolSchemas::kString);
  }
  consume(at + end.size());
  return true;
}

bool ToolParser::before_value() {
  const std::string_view text = rest();
  const std::size_t space = std::min(text.find_first_not_of(kWhiteSpace), text.size());
  const std::string_view next = text.substr(space);
  if (space <= kMaxHeldSpace && (next.empty() || begins(next, kBeginOfValue))) return false;
  if (space > kMaxHeldSpace || !next.starts_with(kBeginOfValue)) {
    say(fmt::format("{}{}{}", syntax_.parameter_begin, key_, kEndOfKey));
    in_junk_ = true;
    state_ = State::kParameters;
    return true;
  }
  consume(space + kBeginOfValue.size());
  const std::size_t begin = std::min(key_.find_first_not_of(kWhiteSpace), key_.size());
  const std::string name = key_.substr(begin, key_.find_last_not_of(kWhiteSpace) + 1 - begin);
  begin_value(name, schemas_->types(tool_, name));
  return true;
}

void ToolParser::begin_value(std::string_view name, unsigned types) {
  std::string key = has_arguments_ ? ", \"" : "{\"";
  append_escaped(name, key);
  argue(key + (types == ToolSchemas::kString ? "\": \"" : "\": "));
  types_ = types;
  value_.clear();
  state_ = State::kValue;
}

// Strings are passed on as they come; whatever may be something else has to be whole first.
bool ToolParser::value() {
  const bool is_text = types_ == ToolSchemas::kString;
  const std::string_view text = rest();
  const std::size_t end = text.find(syntax_.parameter_end);
  const bool found = end != text.npos;
  const std::size_t certain = found ? end : text.size() - beginning_at_end(text, syntax_.parameter_end);
  if (is_text) {
    append_escaped(text.substr(0, certain), value_);
    argue(std::exchange(value_, {}));
  } else {
    value_ += text.substr(0, certain);
  }
  consume(certain + (found ? syntax_.parameter_end.size() : 0));
  if (!found) return false;
  argue(is_text ? "\"" : parameter_json(std::exchange(value_, {}), types_));
  state_ = State::kParameters;
  return true;
}

}  // namespace flash_mla::server
