#pragma once

#include <string>
#include <string_view>

#include "flash_mla/engine.h"

namespace flash_mla::server {

/// How one format writes calls of tools:
///
///     [section_begin] { call_begin HEADER header_end ARGUMENTS call_end } [section_end]
///
/// with white space anywhere between. The header has the name.
struct ToolSyntax {
  enum class Arguments {
    kJson,  ///< JSON text; V3 closes it with ```
    kDsml,  ///< <｜DSML｜parameter name="K" string="true">V</｜DSML｜parameter>
    kGlm,   ///< <arg_key>K</arg_key><arg_value>V</arg_value>; header_end is part of it
  };
  ToolFormat format;
  Arguments arguments;
  std::string_view section_begin, section_end;  ///< empty: there are none
  std::string_view call_begin, header_end, call_end;
  /// What stands around a parameter and its value.
  std::string_view parameter_begin, parameter_end;
};

/// Null for kNone.
const ToolSyntax* tool_syntax(ToolFormat format);

/// A header that is none has no name.
struct ToolHeader {
  std::string name;
  std::string id;  ///< where the format has one
};
ToolHeader read_tool_header(const ToolSyntax& syntax, std::string_view text);

struct DsmlParameter {
  std::string name;  ///< empty: the tag is malformed
  enum class Kind { kUnsaid, kString, kJson } kind = Kind::kUnsaid;
};
/// Of what stands between `<｜DSML｜parameter` and `>`.
DsmlParameter read_dsml_parameter(std::string_view text);

/// How a call of the tool begins, up to its arguments, or where calls have numbers up to its number.
std::string tool_call_begin(const ToolSyntax& syntax, std::string_view name);

/// How an answer begins that calls a tool: up to the name, or with `name` up to its arguments. `num_calls`: of
/// the conversation before.
std::string tool_call_opening(const ToolSyntax& syntax, std::string_view name, int num_calls);

}  // namespace flash_mla::server
