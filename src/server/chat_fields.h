#pragma once

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

/// The tools of a call, and whether they are to be called.
struct ToolUse {
  enum class Choice {
    kNone,      ///< there are no tools, or they must not be called
    kAuto,      ///< the model decides
    kRequired,  ///< at least one call
  };
  Choice choice = Choice::kNone;
  std::string named;               ///< with kRequired, the tool that must be called; empty: any
  std::string tools;               ///< JSON, as a chat template lists them, in the client's order
  std::vector<std::string> names;  ///< of the tools
  std::shared_ptr<const ToolSchemas> schemas;
  bool parallel = true;  ///< more than one call in an answer
};

/// `text`: of the body, which says in which order a schema has its fields.
ToolUse read_tools(const Body& body, std::string_view text);

std::vector<ChatMessage> read_messages(const Body& body);

}  // namespace flash_mla::server
