#pragma once

#include <cstddef>
#include <cstdint>

// What one request may be and ask for. What a server as a whole takes stands in ServerOptions.

namespace flash_mla::server {

inline constexpr std::uint32_t kMaxHeadBytes = 16 * 1024;  ///< request line and header fields

inline constexpr int kMaxNesting = 32;   ///< of a body's JSON
inline constexpr int kMaxChoices = 128;  ///< continuations of all prompts together
inline constexpr std::size_t kMaxMessages = 4096;
inline constexpr std::size_t kMaxChatVariableBytes = 65536;  ///< of chat_template_kwargs' JSON
/// Of an object whose fields are kept in the client's order, which takes time that grows with its square.
inline constexpr std::size_t kMaxOrderedFields = 256;
/// Conversations of /v1/responses that are kept for previous_response_id, and their bytes.
inline constexpr std::size_t kMaxStoredResponses = 1024, kMaxStoredBytes = std::size_t{64} << 20;
inline constexpr std::size_t kMaxTools = 512, kMaxToolName = 64;
/// Each is looked for in every token's text, in the engine's thread.
inline constexpr std::size_t kMaxStops = 64, kMaxStopBytes = 1024;
/// Of bad_words and bad_words_ids, each compared with a text's end before every token.
inline constexpr std::size_t kMaxBadWords = 64, kMaxBadWordBytes = 1024;
/// Of logit_bias and of allowed_token_ids.
inline constexpr std::size_t kMaxNamedTokens = 16384;

/// Bodies up to this size are parsed and tokenized by the thread that serves the connection: a hundredth of a
/// second. Larger ones go to threads of their own, so that they hold up nobody else.
inline constexpr std::size_t kMaxInlineBodyBytes = 32768;
inline constexpr int kBodyThreads = 2;

inline constexpr std::size_t kMaxHostBytes = 255;  ///< of bootstrap_host

/// More of a path or an error tells nothing, and a log must not grow with what strangers send.
inline constexpr std::size_t kMaxLoggedBytes = 200;
/// Of fields that no API defines: how many are named in the log, and how many of one request.
inline constexpr std::size_t kMaxWarnings = 256, kMaxUnknownFields = 16;

}  // namespace flash_mla::server
