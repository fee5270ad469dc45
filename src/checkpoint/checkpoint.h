#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/quantized.h"
#include "checkpoint/stored_format.h"

namespace flash_mla::checkpoint {

struct SafetensorsEntry;

enum class WeightType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

/// A tensor of a checkpoint: row-major, aligned to its element, in the file's own mapped memory (a copy if it
/// is not aligned there). Valid as long as the Checkpoint.
struct WeightView {
  WeightType type{};
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  std::int64_t elements() const;
};

/// A window on a matrix.
struct WeightWindow {
  std::int64_t first_row = 0, rows = 0, first_column = 0, columns = 0;
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
  /// The entry of a file that is called `name`. Throws InvalidArgument if there is none.
  const SafetensorsEntry& entry(std::string_view name) const;
  std::vector<std::string> names() const;  ///< sorted
  /// The tensor called `name`, which must have `shape`. Throws InvalidArgument if it is missing or has
  /// another.
  WeightView get(std::string_view name, const std::vector<std::int64_t>& shape) const;
  /// Without an expectation on the shape. Throws InvalidArgument if it is missing or of another dtype.
  WeightView get(std::string_view name) const;

  /// `name`, which ends in ".weight" where it is stored quantised, as float32, row-major (rows, columns); a vector is
  /// one row. What is quantised is multiplied by its scales, which may be F32, F16, BF16 and of FP8 also F8_E8M0;
  /// those of partial blocks count for what is there. `format` is not looked at for other dtypes. `out` holds
  /// rows * columns floats, or those of `window`: then nothing else of the matrix is read. Throws InvalidArgument as get
  /// does, and for a scale that is not a positive number.
  void read_float32(std::string_view name, std::int64_t rows, std::int64_t columns,
                    const StoredFormat& format, float* out,
                    const std::optional<WeightWindow>& window = std::nullopt) const;
  /// The same in bfloat16 (bits): copied if it is stored so, else rounded to nearest, ties to even.
  void read_bfloat16(std::string_view name, std::int64_t rows, std::int64_t columns,
                     const StoredFormat& format, std::uint16_t* out,
                     const std::optional<WeightWindow>& window = std::nullopt) const;

  /// The form in which `name` is stored if it is quantised, else nothing. Throws InvalidArgument as read_float32.
  std::optional<QuantizedFormat> quantized_format(std::string_view name, std::int64_t rows,
                                                  std::int64_t columns, const StoredFormat& format) const;
  /// A tensor that quantized_format knows as it is stored: `codes` (rows, columns), `scales` (rows, groups), or those of
  /// `window`, whose columns begin with a group. Throws InvalidArgument for a code that is NaN, too.
  void read_quantized(std::string_view name, std::int64_t rows, std::int64_t columns,
                      const StoredFormat& format, std::uint8_t* codes, float* scales,
                      const std::optional<WeightWindow>& window = std::nullopt) const;

 private:
  struct Impl;
  struct Matrix;
  Matrix matrix(std::string_view name, std::int64_t rows, std::int64_t columns, const StoredFormat& format,
                const std::optional<WeightWindow>& window = std::nullopt) const;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace flash_mla::checkpoint
