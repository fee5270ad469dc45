#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

#include "base/json.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/safetensors.h"
#include "model/model.h"

namespace flash_mla::model {
namespace {

// Of a tensor: all of a small one (norms, biases), of others that many pieces, spread over it. Whatever trains a model
// further changes every piece.
constexpr std::size_t kWhole = std::size_t{1} << 16, kPiece = 512, kPieces = 4;

class Digest {
 public:
  Digest() { XXH3_128bits_reset(&state_); }
  void add(const void* data, std::size_t bytes) { XXH3_128bits_update(&state_, data, bytes); }
  /// A text and its length, so that no two sequences of texts are the same bytes.
  void add(const std::string& text) {
    const std::size_t size = text.size();
    add(&size, sizeof(size));
    add(text.data(), size);
  }
  std::string hex() {
    const XXH128_hash_t hash = XXH3_128bits_digest(&state_);
    return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
  }

 private:
  XXH3_state_t state_{};
};

}  // namespace

std::string config_digest(const std::filesystem::path& directory) {
  Digest digest;
  digest.add(read_file(directory / "config.json"));
  return digest.hex();
}

std::string weights_digest(const std::filesystem::path& directory) {
  Digest digest;
  digest.add(read_file(directory / "config.json"));
  const checkpoint::Checkpoint weights = checkpoint::Checkpoint::open(directory);
  for (const std::string& name : weights.names()) {
    const checkpoint::SafetensorsEntry& entry = weights.entry(name);
    const std::span<const std::byte> data = entry.data;
    digest.add(name);
    digest.add(fmt::format("{} {}", entry.dtype, fmt::join(entry.shape, " ")));
    if (data.size() <= kWhole) {
      digest.add(data.data(), data.size());
      continue;
    }
    for (std::size_t i = 0; i < kPieces; ++i) {
      digest.add(data.data() + (data.size() - kPiece) / (kPieces - 1) * i, kPiece);
    }
  }
  return digest.hex();
}

}  // namespace flash_mla::model
