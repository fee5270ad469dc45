#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace flash_mla::checkpoint {

enum class WeightType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

/// A tensor of a checkpoint: row-major, aligned to its element, in the file's own mapped memory (a copy if it
/// is not aligned there). Valid as long as the Checkpoint.
struct WeightView {
  WeightType type{};
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::int64_t elements() const;
};

/// The weights of a model directory: model.safetensors, or else the shards that model.safetensors.index.json
/// lists. Any number of threads may read. Files are memory-mapped and every offset is checked before anything
/// is read; errors name file and tensor.
class Checkpoint {
 public:
  /// Throws InvalidArgument.
  static Checkpoint open(const std::filesystem::path& directory);
  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  bool contains(std::string_view name) const;
  std::vector<std::string> names() const;  ///< sorted
  /// The tensor called `name`, which must have `shape`. Throws InvalidArgument if it is missing or has
  /// another.
  WeightView get(std::string_view name, const std::vector<std::int64_t>& shape) const;
  /// Without an expectation on the shape. Throws InvalidArgument if it is missing or of another dtype.
  WeightView get(std::string_view name) const;

  /// `name` as float32, row-major (rows, columns); a vector is one row. FP8 is multiplied by its
  /// `NAME_scale_inv` blocks (of block_rows x block_columns, those at the edges cut off); the block size is
  /// not looked at for other dtypes. `out` holds rows * columns floats. Throws InvalidArgument as get does.
  void read_float32(std::string_view name, std::int64_t rows, std::int64_t columns, int block_rows,
                    int block_columns, float* out) const;
  /// The same in bfloat16 (bits): copied if it is stored so, else rounded to nearest, ties to even.
  void read_bfloat16(std::string_view name, std::int64_t rows, std::int64_t columns, int block_rows,
                     int block_columns, std::uint16_t* out) const;

 private:
  struct Impl;
  struct Matrix;
  Matrix matrix(std::string_view name, std::int64_t rows, std::int64_t columns, int block_rows,
                int block_columns) const;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla::checkpoint
