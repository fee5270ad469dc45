#include "checkpoint/checkpoint.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "base/element.h"
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

/// A stored matrix with the scales of its blocks, if it has any.
struct Checkpoint::Matrix {
  WeightView view;
  std::int64_t rows = 0, columns = 0;
  std::int64_t block_rows = 0, block_columns = 0, scale_columns = 0;
  std::vector<float> scales;  // (blocks of rows, scale_columns)

  /// Rows [begin, end) as float32.
  void read(std::int64_t begin, std::int64_t end, float* out) const {
    to_float32(view, begin * columns, (end - begin) * columns, out);
    if (scales.empty()) return;
    for (std::int64_t row = begin; row < end; ++row) {
      const float* scale_row = scales.data() + row / block_rows * scale_columns;
      float* out_row = out + (row - begin) * columns;
      for (std::int64_t block = 0; block < scale_columns; ++block) {
        const std::int64_t last = std::min(columns, (block + 1) * block_columns);
        for (std::int64_t column = block * block_columns; column < last; ++column) {
          out_row[column] *= scale_row[block];
        }
      }
    }
  }

  /// f(begin, end) for runs of rows, on all threads if there is enough to do.
  template <class F>
  void for_rows(const F& f) const {
    constexpr std::int64_t kElements = 1 << 16;  // of a run: they stay in a core's cache
    const std::int64_t run = std::max<std::int64_t>(1, kElements / std::max<std::int64_t>(columns, 1));
    const std::int64_t runs = (rows + run - 1) / run;
    parallel_for(runs, runs >= 4 ? default_threads() : 1,
                 [&](std::int64_t i) { f(i * run, std::min(rows, (i + 1) * run)); });
  }
};

Checkpoint::Matrix Checkpoint::matrix(std::string_view name, std::int64_t rows, std::int64_t columns,
                                      int block_rows, int block_columns) const {
  const Impl::Tensor& tensor = impl_->find(name);
  const std::vector<std::int64_t>& shape = tensor.entry.shape;
  const bool vector = rows == 1 && shape.size() == 1 && shape[0] == columns;
  if (!vector && shape != std::vector{rows, columns}) Impl::wrong_shape(tensor, {rows, columns});
  Matrix out;
  out.view = get(name);
  out.rows = rows;
  out.columns = columns;
  if (out.view.type != WeightType::kFloat8E4M3) return out;

  if (block_rows <= 0 || block_columns <= 0) {
    throw InvalidArgument(fmt::format(
        "{}: tensor \"{}\": dtype = F8_E4M3 with blocks of {} x {}: expected a quantization_config with a "
        "weight_block_size in config.json",
        tensor.file->path().string(), name, block_rows, block_columns));
  }
  out.block_rows = block_rows;
  out.block_columns = block_columns;
  const std::int64_t scale_rows = (rows + block_rows - 1) / block_rows;
  out.scale_columns = (columns + block_columns - 1) / block_columns;
  const std::string scale_name = std::string(name) + "_scale_inv";
  const WeightView scales_view = get(scale_name, {scale_rows, out.scale_columns});
  if (scales_view.type == WeightType::kFloat8E4M3) {
    throw InvalidArgument(fmt::format("{}: tensor \"{}\": dtype = F8_E4M3: expected F32, F16 or BF16",
                                      impl_->find(scale_name).file->path().string(), scale_name));
  }
  out.scales.resize(static_cast<std::size_t>(scale_rows * out.scale_columns));
  to_float32(scales_view, out.scales.data());
  return out;
}

void Checkpoint::read_float32(std::string_view name, std::int64_t rows, std::int64_t columns, int block_rows,
                              int block_columns, float* out) const {
  const Matrix stored = matrix(name, rows, columns, block_rows, block_columns);
  stored.for_rows(
      [&](std::int64_t begin, std::int64_t end) { stored.read(begin, end, out + begin * columns); });
}

void Checkpoint::read_bfloat16(std::string_view name, std::int64_t rows, std::int64_t columns, int block_rows,
                               int block_columns, std::uint16_t* out) const {
  const Matrix stored = matrix(name, rows, columns, block_rows, block_columns);
  stored.for_rows([&](std::int64_t begin, std::int64_t end) {
    std::uint16_t* to = out + begin * columns;
    const std::int64_t count = (end - begin) * columns;
    if (stored.view.type == WeightType::kBFloat16) {
      std::memcpy(to, stored.view.data + begin * columns * 2, static_cast<std::size_t>(count) * 2);
      return;
    }
    thread_local std::vector<float> values;
    values.resize(static_cast<std::size_t>(count));
    stored.read(begin, end, values.data());
    for (std::int64_t i = 0; i < count; ++i) to[i] = to_bf16(values[static_cast<std::size_t>(i)]).bits;
  });
}

}  // namespace flash_mla::checkpoint
