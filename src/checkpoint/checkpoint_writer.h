#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::checkpoint {

/// A tensor that is to be written.
struct PlannedTensor {
  std::string name;
  std::string dtype;  ///< as safetensors call it: "BF16", ...
  std::vector<std::int64_t> shape;
};

/// Writes model.safetensors or, of more than `shard_bytes`, shards with model.safetensors.index.json: the headers
/// first, then tensor by tensor in any order, so that no more than one is ever in memory.
class CheckpointWriter {
 public:
  /// Throws std::runtime_error if a file cannot be made.
  CheckpointWriter(const std::filesystem::path& directory, const std::vector<PlannedTensor>& plan,
                   std::uint64_t shard_bytes);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// The bytes of one tensor of the plan, once. Throws std::runtime_error if they cannot be written.
  void write(std::string_view name, std::span<const std::byte> data);
  /// After the last; throws std::logic_error if one is missing.
  void finish();
  std::uint64_t bytes() const { return bytes_; }  ///< of all tensors

 private:
  struct Shard {
    std::filesystem::path path;
    int file = -1;
  };
  struct Place {
    std::size_t shard = 0;
    std::uint64_t begin = 0, bytes = 0;
    bool written = false;
  };
  void open_shard(const std::filesystem::path& path, std::vector<const PlannedTensor*> tensors);
  static void write_at(const Shard& shard, std::uint64_t begin, std::span<const std::byte> data);

  std::vector<Shard> shards_;
  std::map<std::string, Place, std::less<>> places_;
  std::uint64_t bytes_ = 0;
};

}  // namespace flash_mla::checkpoint
