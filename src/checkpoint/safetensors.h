#pragma once

// The safetensors container: 8 bytes of little-endian header length, a JSON header, the tensors' bytes.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::checkpoint {

/// One entry of the header. `data` lies within the file and has the size that shape and dtype say.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;  ///< as in the header: "BF16", "F8_E4M3", ...
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
};

/// The entries of the file whose bytes are `file`, sorted by name. `origin` names it in errors. Throws
/// InvalidArgument unless every byte after the header belongs to exactly one tensor.
std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> file, std::string_view origin);

}  // namespace flash_mla::checkpoint
