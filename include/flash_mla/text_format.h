#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace flash_mla {

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
};

/// Bytes of TextFormat::source, or of all choices together; bytes of a regular expression, also of one in a
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
