#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace flash_mla {

/// Calls of functions as a model writes them:
///
///     section_begin CALL { separator CALL } section_end
///
/// where a call is a function's `begin`, its arguments and `end`.
struct CallNotation {
  enum class Arguments {
    kJson,  ///< a JSON object
    kDsml,  ///< <｜DSML｜parameter name="K" string="true">V</｜DSML｜parameter>, where the tag says what is no JSON
    kGlm,  ///< <arg_key>K</arg_key><arg_value>V</arg_value>, where strings have no quotes
  };
  struct Function {
    std::string begin;       ///< of a call, up to its arguments; not empty
    std::string parameters;  ///< a JSON schema; empty: any object
  };
  Arguments arguments = Arguments::kJson;
  std::vector<Function> functions;  ///< empty: there are no calls
  std::string section_begin, separator, end, section_end;
  /// Not empty: the number of a call stands behind its `begin`, and this behind the number.
  std::string number_end;
  /// Begins every function's `begin`. Not empty, in a text that is free otherwise: calls come up wherever the
  /// text has it, and nothing else does behind it. The sections are left to the text then.
  std::string trigger;
  /// What the prompt ends with of section_begin and the first call's begin; functions that do not go on from
  /// there do not come first.
  std::string opened;
  bool parallel = true;  ///< more than one call
};

/// What a continuation's text must be: tokens that would leave it are excluded before each draw. The text is
/// whole where it ends with FinishReason::kStop, and the beginning of one where it ends with kLength.
struct TextFormat {
  enum class Kind {
    kFree,
    kJsonObject,  ///< any JSON object
    kJsonSchema,  ///< JSON that is valid by `source`, a JSON schema. Properties that the schema does not name
                  ///< come up only where additionalProperties says so
    kRegex,       ///< the whole text matches the regular expression `source`
    kGrammar,     ///< from the rule "root" of `source`, in the EBNF that llama.cpp (GBNF) and XGrammar read
    kChoice,      ///< one of `choices`
  };
  Kind kind = Kind::kFree;
  std::string source;
  std::vector<std::string> choices;
  /// Calls that may stand in place of the text, or with kFree are all of it (but see CallNotation::trigger).
  CallNotation calls = {};
  /// Not empty ("</think>"): the format begins behind the first time that the text has this and up to four line
  /// breaks. What stands before is free, but does not end the text.
  std::string begins_behind = {};
  /// Not empty ("<think>"), with begins_behind: if the text does not begin with this and white space before it,
  /// the format begins at once.
  std::string opened_by = {};

  bool is_free() const { return kind == Kind::kFree && calls.functions.empty(); }
};

/// Bytes of TextFormat::source, of all choices together, or of all functions of calls; bytes of a regular expression, also of one in a
/// schema; and the most that one repetition in any of them may ask for.
inline constexpr std::size_t kMaxFormatBytes = 65536, kMaxRegexBytes = 4096;
inline constexpr int kMaxRepetitions = 4096;

/// The format of a call of one of the functions, for `tool_choice`: "required" (several) or a name (one).
/// `parameters` are JSON schemas; empty: any object. The text is {"name": NAME, "arguments": {...}}, or with
/// `parallel` an array of one or more of these.
struct FunctionShape {
  std::string name;
  std::string parameters;
};
TextFormat function_call_format(const std::vector<FunctionShape>& functions, bool parallel = false);
/// The arguments of one function alone: for models whose template writes the name itself.
TextFormat arguments_format(const FunctionShape& function);

}  // namespace flash_mla
