#include "checkpoint/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "base/element.h"
#include "base/fp8.h"
#include "base/json.h"
#include "base/parallel.h"
#include "checkpoint/convert.h"
#include "checkpoint/mapped_file.h"
#include "checkpoint/safetensors.h"
#include "flash_mla/error.h"

namespace flash_mla::checkpoint {
namespace {

namespace fs = std::filesystem;

struct TypeName {
  std::string_view name;
  WeightType type;
  std::size_t bytes;
};
constexpr TypeName kTypes[] = {{"F32", WeightType::kFloat32, 4},
                               {"F16", WeightType::kFloat16, 2},
                               {"BF16", WeightType::kBFloat16, 2},
                               {"F8_E4M3", WeightType::kFloat8E4M3, 1}};

/// File name of each tensor's shard, as the index gives it.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const Json json = parse_json(read_file(path), path.string());
  const JsonObject map = JsonObject(json, path.string()).object("weight_map");
  std::map<std::string, std::string> out;
  for (const auto& [name, file] : map.json().items()) {
    const std::string shard = file.is_string() ? file.get<std::string>() : "";
    // A shard lies beside its index: a separator or ".." would name some other file of the machine.
    if (shard.empty() || shard == "." || shard == ".." ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != shard.npos) {
      throw InvalidArgument(
          fmt::format("{}: tensor \"{}\": file = {}: expected the name of a file in the same folder",
                      path.string(), name, shown(file)));
    }
    out.emplace(name, shard);
  }
  if (out.empty())
    throw InvalidArgument(fmt::format("{}: weight_map is empty: expected tensors", path.string()));
  return out;
}

}  // namespace

std::int64_t WeightView::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n *= size;
  return n;
}

struct Checkpoint::Impl {
  struct Tensor {
    SafetensorsEntry entry;
    const MappedFile* file;
  };

  fs::path directory;
  std::vector<std::unique_ptr<MappedFile>> files;
  std::map<std::string, Tensor, std::less<>> tensors;
  std::mutex aligned_mutex;
  std::map<const Tensor*, std::unique_ptr<std::byte[]>> aligned;  // copies of tensors that are not

  void add_file(const fs::path& path) {
    files.push_back(std::make_unique<MappedFile>(path));
    const MappedFile* file = files.back().get();
    for (SafetensorsEntry& entry : parse_safetensors(file->bytes(), path.string())) {
      std::string name = entry.name;
      const auto [at, added] = tensors.try_emplace(name, Tensor{std::move(entry), file});
      if (!added) {
        throw InvalidArgument(fmt::format("{}: tensor \"{}\" is also in {}: expected it in one file",
                                          path.string(), name, at->second.file->path().string()));
      }
    }
  }

  /// The tensors of the index and no others.
  void add_shards(const std::map<std::string, std::string>& index) {
    std::set<std::string> opened;
    for (const auto& [name, shard] : index) {
      const fs::path path = directory / shard;
      if (!opened.insert(shard).second) continue;
      if (!fs::is_regular_file(path)) {
        throw InvalidArgument(fmt::format("{}: cannot be read; {} expects tensor \"{}\" there", path.string(),
                                          "model.safetensors.index.json", name));
      }
      add_file(path);
    }
    for (const auto& [name, shard] : index) {
      const auto found = tensors.find(name);
      if (found == tensors.end() || found->second.file->path().filename() != shard) {
        throw InvalidArgument(fmt::format("{}: has no tensor \"{}\", which the index expects there",
                                          (directory / shard).string(), name));
      }
    }
    std::erase_if(tensors, [&](const auto& item) { return !index.contains(item.first); });
  }

  const Tensor& find(std::string_view name) const {
    const auto found = tensors.find(name);
    if (found == tensors.end()) {
      throw InvalidArgument(fmt::format("{}: the checkpoint has no tensor \"{}\"", directory.string(), name));
    }
    return found->second;
  }

  /// Writers align tensors, but the format does not ask for it.
  const std::byte* aligned_data(const Tensor& tensor, std::size_t alignment) {
    const std::span<const std::byte> data = tensor.entry.data;
    if (reinterpret_cast<std::uintptr_t>(data.data()) % alignment == 0) return data.data();
    const std::lock_guard lock(aligned_mutex);
    auto& copy = aligned[&tensor];
    if (copy == nullptr) {
      copy = std::make_unique<std::byte[]>(data.size());
      std::copy(data.begin(), data.end(), copy.get());
    }
    return copy.get();
  }

  /// What `name` says of `what` is not `expected`.
  [[noreturn]] void fail(std::string_view name, std::string_view what, std::string_view expected) const {
    throw InvalidArgument(fmt::format("{}: tensor \"{}\": {}: expected {}", find(name).file->path().string(),
                                      name, what, expected));
  }

  /// The packed tensor that stands for `name`, or "".
  std::string packed_name(std::string_view name) const {
    if (tensors.contains(name) || !name.ends_with(".weight")) return "";
    std::string packed = std::string(name) + "_packed";
    return tensors.contains(packed) ? packed : "";
  }

  /// What the names of a packed tensor and of those beside it have in common.
  static std::string base_of_packed(const std::string& packed) {
    return packed.substr(0, packed.size() - std::string_view("_packed").size());
  }

  /// Words of 8 codes that compressed-tensors packed; refuses zero points and orders of columns.
  WeightView packed_words(const std::string& packed, std::int64_t rows, std::int64_t columns) {
    const std::string base = base_of_packed(packed);
    for (const char* other : {"_zero_point", "_g_idx"}) {
      if (tensors.contains(base + other)) {
        fail(base + other, "weights with such a tensor", "symmetric weights in the order of their columns");
      }
    }
    const Tensor& shape = find(base + "_shape");
    const bool wide = shape.entry.dtype == "I64";
    if ((!wide && shape.entry.dtype != "I32") || shape.entry.shape != std::vector<std::int64_t>{2}) {
      fail(base + "_shape", "dtype = " + shape.entry.dtype, "two whole numbers, I64 or I32");
    }
    std::int64_t size[2] = {};
    for (std::size_t i = 0; i < 2; ++i) {
      std::int32_t narrow = 0;
      const std::byte* at = shape.entry.data.data() + i * (wide ? std::size_t{8} : std::size_t{4});
      if (wide) {
        std::memcpy(&size[i], at, 8);
      } else {
        std::memcpy(&narrow, at, 4);
        size[i] = narrow;
      }
    }
    if (size[0] != rows || size[1] != columns) {
      fail(base + "_shape", fmt::format("{}, {}", size[0], size[1]), fmt::format("{}, {}", rows, columns));
    }
    const Tensor& words = find(packed);
    if (words.entry.dtype != "I32") fail(packed, "dtype = " + words.entry.dtype, "I32");
    const std::vector<std::int64_t> expected = {rows, (columns + 7) / 8};
    if (words.entry.shape != expected) wrong_shape(words, expected);
    return {WeightType::kFloat32, words.entry.shape, words.entry.data.data()};
  }

  /// Scales of `shape`, positive; with `powers` they may be E8M0.
  std::vector<float> scales(const std::string& name, const std::vector<std::int64_t>& shape, bool powers) {
    const Tensor& tensor = find(name);
    const std::string& dtype = tensor.entry.dtype;
    if (tensor.entry.shape != shape) wrong_shape(tensor, shape);
    std::vector<float> out(static_cast<std::size_t>(shape[0] * shape[1]));
    const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                    [&](const TypeName& t) { return t.name == dtype; });
    if (powers && dtype == "F8_E8M0") {
      for (std::size_t i = 0; i < out.size(); ++i) {
        out[i] = to_float(E8m0{std::to_integer<std::uint8_t>(tensor.entry.data[i])});
      }
    } else if (type == std::end(kTypes) || type->type == WeightType::kFloat8E4M3) {
      fail(name, "dtype = " + dtype, powers ? "F32, F16, BF16 or F8_E8M0" : "F32, F16 or BF16");
    } else {
      to_float32({type->type, shape, aligned_data(tensor, type->bytes)}, out.data());
    }
    const auto bad = std::find_if(out.begin(), out.end(), [](float x) { return !(x > 0 && x < INFINITY); });
    if (bad != out.end()) {
      const auto at = bad - out.begin();
      fail(name, fmt::format("{} at row {}, column {}", *bad, at / shape[1], at % shape[1]),
           "scales that are positive numbers");
    }
    return out;
  }

  [[noreturn]] static void wrong_shape(const Tensor& tensor, const std::vector<std::int64_t>& expected) {
    throw InvalidArgument(fmt::format("{}: tensor \"{}\": shape = [{}]: expected [{}]",
                                      tensor.file->path().string(), tensor.entry.name,
                                      fmt::join(tensor.entry.shape, ", "), fmt::join(expected, ", ")));
  }
};

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

Checkpoint Checkpoint::open(const fs::path& directory) {
  auto impl = std::make_unique<Impl>();
  impl->directory = directory;
  const fs::path single = directory / "model.safetensors";
  const fs::path index = directory / "model.safetensors.index.json";
  if (fs::exists(single)) {
    impl->add_file(single);
  } else if (fs::exists(index)) {
    impl->add_shards(read_index(index));
  } else {
    throw InvalidArgument(fmt::format(
        "{}: expected a folder with model.safetensors or model.safetensors.index.json", directory.string()));
  }
  return Checkpoint(std::move(impl));
}

bool Checkpoint::contains(std::string_view name) const {
  return impl_->tensors.find(name) != impl_->tensors.end();
}

const SafetensorsEntry& Checkpoint::entry(std::string_view name) const { return impl_->find(name).entry; }

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> out;
  for (const auto& item : impl_->tensors) out.push_back(item.first);
  return out;
}

WeightView Checkpoint::get(std::string_view name, const std::vector<std::int64_t>& shape) const {
  const Impl::Tensor& tensor = impl_->find(name);
  if (tensor.entry.shape != shape) Impl::wrong_shape(tensor, shape);
  return get(name);
}

WeightView Checkpoint::get(std::string_view name) const {
  const Impl::Tensor& tensor = impl_->find(name);
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes),
                                  [&](const TypeName& t) { return t.name == tensor.entry.dtype; });
  if (type == std::end(kTypes)) {
    throw InvalidArgument(fmt::format("{}: tensor \"{}\": dtype = {}: expected F32, F16, BF16 or F8_E4M3",
                                      tensor.file->path().string(), name, tensor.entry.dtype));
  }
  return {type->type, tensor.entry.shape, impl_->aligned_data(tensor, type->bytes)};
}

/// A window on a stored matrix, with its scales if it is quantised. Rows and columns below are the window's.
struct Checkpoint::Matrix {
  WeightView view;
  std::int64_t stored_columns = 0;
  WeightWindow window;
  std::optional<QuantizedFormat> format;
  std::int64_t scale_rows = 1;  ///< rows of one scale
  std::vector<float> scales;    ///< (blocks of rows, groups), of the whole matrix

  std::int64_t columns() const { return window.columns; }
  /// Scales of a row, from the group that the window's first column is in.
  const float* scales_of(std::int64_t row) const {
    return scales.data() + (window.first_row + row) / scale_rows * format->groups(stored_columns) +
           window.first_column / format->group;
  }
  /// f(row, count) of runs of rows that lie one behind the other, each of which is `count` of them.
  template <class F>
  void for_runs(std::int64_t begin, std::int64_t end, const F& f) const {
    if (window.columns == stored_columns) return f(begin, end - begin);
    for (std::int64_t row = begin; row < end; ++row) f(row, std::int64_t{1});
  }
  /// Where a row's elements begin among the stored ones.
  std::int64_t offset(std::int64_t row) const {
    return (window.first_row + row) * stored_columns + window.first_column;
  }

  /// Codes of rows [begin, end), if it is quantised.
  void read_codes(std::int64_t begin, std::int64_t end, std::uint8_t* out) const {
    if (format->type == QuantizedType::kE4m3) {
      for_runs(begin, end, [&](std::int64_t row, std::int64_t count) {
        std::memcpy(out + (row - begin) * columns(), view.data + offset(row),
                    static_cast<std::size_t>(count * columns()));
      });
      return;
    }
    const std::int64_t row_bytes = view.shape[1] * 4;
    for (std::int64_t row = begin; row < end; ++row) {
      // Words are little-endian with the first code in the lowest bits: so are the bytes.
      const auto* from =
          reinterpret_cast<const std::uint8_t*>(view.data + (window.first_row + row) * row_bytes);
      std::uint8_t* to = out + (row - begin) * columns();
      std::int64_t at = window.first_column;
      const std::int64_t last = at + columns();
      if (at % 2 != 0 && at < last) *to++ = from[at++ / 2] >> 4;
      for (; at + 1 < last; at += 2) {
        *to++ = from[at / 2] & 15;
        *to++ = from[at / 2] >> 4;
      }
      if (at < last) *to = from[at / 2] & 15;
    }
  }

  /// Rows [begin, end) as float32.
  void read(std::int64_t begin, std::int64_t end, float* out) const {
    if (!format || format->type == QuantizedType::kE4m3) {
      for_runs(begin, end, [&](std::int64_t row, std::int64_t count) {
        to_float32(view, offset(row), count * columns(), out + (row - begin) * columns());
      });
      if (!format) return;
    } else {
      thread_local std::vector<std::uint8_t> codes;
      codes.resize(static_cast<std::size_t>((end - begin) * columns()));
      read_codes(begin, end, codes.data());
      for (std::size_t i = 0; i < codes.size(); ++i) {
        out[i] = quantized_value(QuantizedType::kInt4, codes[i]);
      }
    }
    for (std::int64_t row = begin; row < end; ++row) {
      const float* scale = scales_of(row);
      float* out_row = out + (row - begin) * columns();
      // The first group may have begun before the window.
      std::int64_t last = format->group - window.first_column % format->group;
      for (std::int64_t column = 0; column < columns(); last += format->group, ++scale) {
        for (; column < std::min(columns(), last); ++column) out_row[column] *= *scale;
      }
    }
  }

  /// f(begin, end) for runs of rows, on all threads if there is enough to do.
  template <class F>
  void for_rows(const F& f) const {
    constexpr std::int64_t kElements = 1 << 16;  // of a run: they stay in a core's cache
    const std::int64_t run = std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(columns(), 1));
    const std::int64_t rows = window.rows, runs = (rows + run - 1) / run;
    parallel_for(runs, runs >= 4 ? default_threads() : 1,
                 [&](std::int64_t i) { f(i * run, std::min(rows, (i + 1) * run)); });
  }
};

Checkpoint::Matrix Checkpoint::matrix(std::string_view name, std::int64_t rows, std::int64_t columns,
                                      const StoredFormat& format,
                                      const std::optional<WeightWindow>& window) const {
  Matrix out;
  out.stored_columns = columns;
  out.window = window.value_or(WeightWindow{0, rows, 0, columns});
  const std::string packed = impl_->packed_name(name);
  if (!packed.empty()) {
    if (format.int4_group == 0) {
      impl_->fail(packed, "packed weights",
                  "a quantization_config of compressed-tensors with 4 bits in config.json");
    }
    out.format = {QuantizedType::kInt4, format.int4_group > 0 ? format.int4_group : columns};
    out.view = impl_->packed_words(packed, rows, columns);
    const std::string base = Impl::base_of_packed(packed);
    out.scales = impl_->scales(base + "_scale", {rows, out.format->groups(columns)}, false);
    return out;
  }
  const Impl::Tensor& tensor = impl_->find(name);
  const std::vector<std::int64_t>& shape = tensor.entry.shape;
  const bool vector = rows == 1 && shape.size() == 1 && shape[0] == columns;
  if (!vector && shape != std::vector{rows, columns}) Impl::wrong_shape(tensor, {rows, columns});
  out.view = get(name);
  if (out.view.type != WeightType::kFloat8E4M3) return out;

  if (format.fp8_block_rows <= 0 || format.fp8_block_columns <= 0) {
    impl_->fail(name,
                fmt::format("dtype = F8_E4M3 with blocks of {} x {}", format.fp8_block_rows,
                            format.fp8_block_columns),
                "a quantization_config with a weight_block_size in config.json");
  }
  out.format = {QuantizedType::kE4m3, format.fp8_block_columns};
  out.scale_rows = format.fp8_block_rows;
  out.scales =
      impl_->scales(std::string(name) + "_scale_inv",
                    {(rows + out.scale_rows - 1) / out.scale_rows, out.format->groups(columns)}, true);
  return out;
}

void Checkpoint::read_float32(std::string_view name, std::int64_t rows, std::int64_t columns,
                              const StoredFormat& format, float* out,
                              const std::optional<WeightWindow>& window) const {
  const Matrix stored = matrix(name, rows, columns, format, window);
  stored.for_rows(
      [&](std::int64_t begin, std::int64_t end) { stored.read(begin, end, out + begin * stored.columns()); });
}

void Checkpoint::read_bfloat16(std::string_view name, std::int64_t rows, std::int64_t columns,
                               const StoredFormat& format, std::uint16_t* out,
                               const std::optional<WeightWindow>& window) const {
  const Matrix stored = matrix(name, rows, columns, format, window);
  stored.for_rows([&](std::int64_t begin, std::int64_t end) {
    std::uint16_t* to = out + begin * stored.columns();
    const std::int64_t size = (end - begin) * stored.columns();
    if (stored.view.type == WeightType::kBFloat16 && !stored.format) {
      stored.for_runs(begin, end, [&](std::int64_t row, std::int64_t count) {
        std::memcpy(to + (row - begin) * stored.columns(), stored.view.data + stored.offset(row) * 2,
                    static_cast<std::size_t>(count * stored.columns()) * 2);
      });
      return;
    }
    thread_local std::vector<float> values;
    values.resize(static_cast<std::size_t>(size));
    stored.read(begin, end, values.data());
    for (std::int64_t i = 0; i < size; ++i) to[i] = to_bf16(values[static_cast<std::size_t>(i)]).bits;
  });
}

std::optional<QuantizedFormat> Checkpoint::quantized_format(std::string_view name, std::int64_t rows,
                                                            std::int64_t columns,
                                                            const StoredFormat& format) const {
  // Without the scales, which would be read twice.
  if (!impl_->packed_name(name).empty()) {
    if (format.int4_group == 0) return std::nullopt;  // read_float32 says what is missing
    return QuantizedFormat{QuantizedType::kInt4, format.int4_group > 0 ? format.int4_group : columns};
  }
  if (get(name, {rows, columns}).type != WeightType::kFloat8E4M3 || format.fp8_block_columns <= 0) {
    return std::nullopt;
  }
  return QuantizedFormat{QuantizedType::kE4m3, format.fp8_block_columns};
}

void Checkpoint::read_quantized(std::string_view name, std::int64_t rows, std::int64_t columns,
                                const StoredFormat& format, std::uint8_t* codes, float* scales,
                                const std::optional<WeightWindow>& window) const {
  const Matrix stored = matrix(name, rows, columns, format, window);
  if (!stored.format) impl_->fail(name, "not quantised", "F8_E4M3 or packed weights");
  const std::int64_t width = stored.columns(), groups = stored.format->groups(width);
  stored.for_rows([&](std::int64_t begin, std::int64_t end) {
    std::uint8_t* to = codes + begin * width;
    stored.read_codes(begin, end, to);
    for (std::int64_t row = begin; row < end; ++row) {
      std::copy_n(stored.scales_of(row), groups, scales + row * groups);
    }
    if (stored.format->type != QuantizedType::kE4m3) return;
    const std::int64_t count = (end - begin) * width;
    bool good = true;  // no early end, so that the loop takes many at a time
    for (std::int64_t i = 0; i < count; ++i) good &= (to[i] & 0x7F) != 0x7F;
    if (good) return;
    const std::int64_t bad =
        std::find_if(to, to + count, [](std::uint8_t c) { return (c & 0x7F) == 0x7F; }) - codes;
    throw InvalidArgument(fmt::format("tensor {} holds nan at row {}, column {}, expected finite weights",
                                      name, stored.window.first_row + bad / width,
                                      stored.window.first_column + bad % width));
  });
}

}  // namespace flash_mla::checkpoint
