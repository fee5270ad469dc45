#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "flash_mla/engine.h"
#include "server/api_error.h"
#include "server/tool_schemas.h"

// What a chat's body has besides a completion's: messages and tools. Everything throws ApiError (400) that
// names the field.

namespace flash_mla::server {

/// What the model may call.
struct Tool {
  std::string name;
  std::string parameters;  ///< a JSON schema with its fields in the client's order; empty: any object
  bool strict = false;     ///< arguments that are not of the schema must not come up
};

/// The tools of a call, and whether they are to be called.
struct ToolUse {
  enum class Choice {
    kNone,      ///< there are no tools, or they must not be called
    kAuto,      ///< the model decides
    kRequired,  ///< at least one call
  };
  Choice choice = Choice::kNone;
  std::string named;            ///< with kRequired, the tool that must be called; empty: any
  std::string tools;            ///< JSON, as a chat template lists them, in the client's order
  std::vector<Tool> functions;  ///< the same, one by one
  std::shared_ptr<const ToolSchemas> schemas;
  bool parallel = true;  ///< more than one call in an answer

  bool wants_grammar() const {
    return choice == Choice::kRequired ||
           (choice == Choice::kAuto && std::ranges::any_of(functions, &Tool::strict));
  }
};

/// `text`: of the body, which says in which order a schema has its fields.
ToolUse read_tools(const Body& body, std::string_view text);

std::vector<ChatMessage> read_messages(const Body& body);

}  // namespace flash_mla::server
