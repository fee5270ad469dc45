#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat_template.h"
#include "text/text_part.h"

// What DeepSeek's prompt formats share. DSML is their markup of calls: XML whose tags begin with a token of its own.
// Wording, tokens and blanks are those that the models were trained with, so they are data, to the last line
// break.

namespace flash_mla::text::deepseek {

using OrderedJson = nlohmann::ordered_json;

constexpr std::string_view kBegin = "<｜begin▁of▁sentence｜>", kEnd = "<｜end▁of▁sentence｜>",
                           kUser = "<｜User｜>", kAssistant = "<｜Assistant｜>",
                           kReminder = "<｜latest_reminder｜>", kThink = "<think>", kEndThink = "</think>";

/// An object's field if it is there and not null.
const OrderedJson* find(const OrderedJson& object, const char* name);
/// As find, and not empty either, which counts as missing in the formats' code.
const OrderedJson* find_some(const OrderedJson& object, const char* name);
/// A field that is a string; else empty.
std::string string_of(const OrderedJson& object, const char* name);

/// A piece of a V4 user's turn: what the user says, or what a tool returned.
struct Block {
  std::string text;
  std::string call;  // the identifier of the tool's call
  bool result = false;
};

struct Turn {
  const OrderedJson* message;
  std::size_t index;  // of the (first) message in what the client sent
  std::string role;
  std::string task;           // V4
  std::vector<Block> blocks;  // of a user, V4
};

/// Throws InvalidArgument that names the message.
[[noreturn]] void fail(const Turn& turn, std::string_view what);
/// A field that is a string, or parts that are text; empty if it is missing.
std::string text_of(const Turn& turn, const char* name = "content");

/// A prompt in the making.
class Prompt {
 public:
  void own(std::string_view text) { add(text, /*control=*/true); }
  void client(std::string_view text);
  std::vector<TextPart> take() { return std::move(parts_); }

 private:
  void add(std::string_view text, bool control);
  std::vector<TextPart> parts_;
};

/// What both formats have in common.
class Renderer {
 public:
  /// `tools`, `end_of_tools`: the words around the tools' schemas. `calls`: the tag of a block of calls.
  Renderer(const ChatInput& input, std::string_view tools, std::string_view end_of_tools,
           std::string_view calls);

 protected:
  /// The tools of a turn's message, or those of the whole conversation; null if there are none.
  const OrderedJson* tools_of(std::size_t i) const;
  void find_last_user();
  /// Drops whatever is of another role before the last user's message.
  void drop_old(std::span<const std::string_view> kept_roles);
  bool is_last(std::size_t i) const { return i + 1 == turns_.size(); }

  void put_tools(std::size_t i);
  void put_response_format(std::size_t i);
  /// `loose`: arguments that are no JSON become one argument of that name.
  void put_calls(const Turn& turn, bool loose);
  static std::string reasoning_of(const Turn& turn);
  [[noreturn]] static void fail_role(const Turn& turn, std::string_view expected);

  const bool thinking_;
  bool drop_thinking_;
  const bool generate_;
  std::vector<Turn> turns_;
  long last_user_ = -1;  // -1: there is none
  Prompt prompt_;

 private:
  void put_arguments(const Turn& turn, const OrderedJson& function, bool loose);

  std::string_view tools_, end_of_tools_, calls_;
  const OrderedJson* given_tools_ = nullptr;
};

std::vector<TextPart> render_v32(const ChatInput& input);
std::vector<TextPart> render_v4(const ChatInput& input);

}  // namespace flash_mla::text::deepseek
