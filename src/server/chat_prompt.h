#pragma once

#include <string_view>

#include "flash_mla/engine.h"
#include "server/call.h"
#include "server/server.h"

namespace flash_mla::server {

/// Throws InvalidArgument, with the names that there are, for one that is none.
void check_reasoning_parser(std::string_view name);

/// Puts a chat's messages through the model's template, and says what its answer will be made of: whether the
/// prompt has opened the reasoning, and how calls of tools look. A call that has to come is begun in the
/// prompt, behind reasoning that is closed. Throws ApiError, and what Engine::submit throws for messages.
void prepare_chat(const Engine& engine, const ServerOptions& options, Call& call);

}  // namespace flash_mla::server
