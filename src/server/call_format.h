#pragma once

#include "flash_mla/engine.h"
#include "server/call.h"
#include "server/tool_syntax.h"

namespace flash_mla::server {

/// How calls of tools of this syntax are written, for grammars. `opened`: what the prompt has of the first one.
CallNotation call_notation(const ToolSyntax& syntax, const ToolUse& tools, std::string_view opened);

/// Adds to the format of an answer what its calls of tools must be: where one has to come, where a tool is strict,
/// and where the words have a format, which calls do not. Schemas of tools that are not strict are left out where
/// no grammar can be made of them. Throws ApiError that names the tool whose schema is not supported.
void add_call_format(const Engine& engine, const ToolSyntax& syntax, Call& call);

}  // namespace flash_mla::server
