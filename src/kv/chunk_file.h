#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string_view>

#include "base/buffer.h"

// A file of one chunk: a header with a checksum of all that follows it, then the salt, all tokens up to the chunk's end,
// and the bytes of its pages. Numbers lie as the machine has them: what another kind of machine wrote is a miss.

namespace flash_mla::kv {

/// Size of the file.
std::size_t chunk_file_bytes(std::string_view salt, std::span<const std::int32_t> tokens, std::size_t bytes);

/// Writes `path`, under the name `temporary` first: who finds it finds all of it, or after a crash what
/// read_chunk_file refuses. False, with neither file left, if that fails.
bool write_chunk_file(const std::filesystem::path& path, const std::filesystem::path& temporary,
                      std::string_view salt, std::span<const std::int32_t> tokens, const Buffer& bytes);

enum class ChunkFile {
  kGood,
  kMissing,  ///< there is none, or it cannot be read now
  kWrong,    ///< torn, changed, or of other salt or tokens
};
/// Reads `path` into `to`, whose size it must have.
ChunkFile read_chunk_file(const std::filesystem::path& path, std::string_view salt,
                          std::span<const std::int32_t> tokens, const Buffer& to);

}  // namespace flash_mla::kv
