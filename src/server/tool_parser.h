#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "server/tool_schemas.h"
#include "server/tool_syntax.h"

namespace flash_mla::server {

/// News of one call of a tool: the first has its name, later ones more of its arguments, which together are JSON text.
struct ToolCallPiece {
  int index = 0;  ///< among the calls of an answer
  std::string id, name;
  std::string arguments;
};

/// What a text says besides calls, and its calls.
struct ToolOutput {
  std::string content;
  std::vector<ToolCallPiece> calls;  ///< at most one for each index, in order
};

/// Finds calls of tools in what a model writes. Whatever pieces the text comes in, the pieces of the result
/// add up to the same. What turns out to be no call is content, with all its markers; white space (up to 64
/// bytes) before, between and behind calls is theirs. It holds back no more than a header or a marker (half
/// a KiB), and values whose type is only known once they are whole. A text that ends within a call leaves its
/// arguments unfinished.
class ToolParser {
 public:
  /// `id_prefix`: of calls whose format has no identifier; their index follows. `parallel`: false gives the
  /// first call and drops what stands behind it.
  ToolParser(const ToolSyntax& syntax, std::shared_ptr<const ToolSchemas> schemas, std::string id_prefix,
             bool parallel);

  ToolOutput push(std::string_view text);
  ToolOutput finish();  ///< the text ends here
  int num_calls() const { return num_calls_; }
  /// Nothing more comes of it, whatever the text goes on with.
  bool done() const { return state_ == State::kDone; }

 private:
  enum class State {
    kContent,
    kSection,
    kHeader,
    kJson,
    kParameters,
    kParameterHeader,
    kBeforeValue,
    kValue,
    kDone
  };
  enum class Match { kNo, kPartial, kYes };

  std::string_view rest() const { return std::string_view(held_).substr(at_); }
  void consume(std::size_t n) { at_ += n; }
  /// Each does what can be done in its state; false if that takes more text.
  bool step();
  bool content();
  bool section();
  bool header();
  bool json();
  bool parameters();
  bool parameter_header();
  bool before_value();
  bool value();

  void skip_space();
  void say(std::string_view text);
  void give_up();  ///< what was taken for a call is content
  void begin_call(ToolHeader header);
  void end_call();
  void argue(std::string_view arguments);
  void begin_value(std::string_view name, unsigned types);
  Match end_of_json(std::string_view text, std::size_t& size) const;

  const ToolSyntax& syntax_;
  std::shared_ptr<const ToolSchemas> schemas_;
  std::string id_prefix_;
  bool parallel_;

  State state_ = State::kContent;
  std::string held_;  // text that has arrived; before at_ it is used up
  std::size_t at_ = 0;
  ToolOutput out_;
  std::string literal_;  // markers of a call that has not got a name yet
  bool calls_in_section_ = false;
  bool behind_call_ = false;  // nothing but white space since
  int num_calls_ = 0;
  std::string tool_;                          // of the call at hand
  bool in_junk_ = false;                      // between parameters: what does not belong there
  bool has_arguments_ = false;                // it has some already
  bool in_string_ = false, escaped_ = false;  // of JSON
  std::string key_, value_;                   // of the parameter at hand
  unsigned types_ = 0;
};

}  // namespace flash_mla::server
