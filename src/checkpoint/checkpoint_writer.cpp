#include "checkpoint/checkpoint_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "base/json.h"

namespace flash_mla::checkpoint {
namespace {

std::uint64_t element_bytes(std::string_view dtype) {
  if (dtype == "I64" || dtype == "F64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "BF16" || dtype == "F16" || dtype == "I16" || dtype == "U16") return 2;
  return 1;
}

std::uint64_t bytes_of(const PlannedTensor& tensor) {
  std::uint64_t out = element_bytes(tensor.dtype);
  for (const std::int64_t size : tensor.shape) out *= static_cast<std::uint64_t>(size);
  return out;
}

[[noreturn]] void fail(const std::filesystem::path& path) {
  throw std::runtime_error(fmt::format("{}: {}", path.string(), std::strerror(errno)));
}

}  // namespace

CheckpointWriter::CheckpointWriter(const std::filesystem::path& directory,
                                   const std::vector<PlannedTensor>& plan, std::uint64_t shard_bytes) {
  std::vector<std::vector<const PlannedTensor*>> shards(1);
  std::uint64_t in_shard = 0;
  for (const PlannedTensor& tensor : plan) {
    const std::uint64_t size = bytes_of(tensor);
    if (in_shard + size > shard_bytes && !shards.back().empty()) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().push_back(&tensor);
    in_shard += size;
    bytes_ += size;
  }
  if (shards.size() == 1) {
    open_shard(directory / "model.safetensors", shards[0]);
    return;
  }
  Json index = {{"metadata", {{"total_size", bytes_}}}, {"weight_map", Json::object()}};
  for (std::size_t i = 0; i < shards.size(); ++i) {
    const std::string name = fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
    open_shard(directory / name, shards[i]);
    for (const PlannedTensor* tensor : shards[i]) index["weight_map"][tensor->name] = name;
  }
  const std::filesystem::path path = directory / "model.safetensors.index.json";
  std::ofstream out(path);
  out << index.dump(2) << '\n';
  if (!out.flush()) fail(path);
}

CheckpointWriter::~CheckpointWriter() {
  for (const Shard& shard : shards_) ::close(shard.file);
}

void CheckpointWriter::open_shard(const std::filesystem::path& path,
                                  std::vector<const PlannedTensor*> tensors) {
  // Large elements first, so that all are aligned.
  std::stable_sort(tensors.begin(), tensors.end(), [](const PlannedTensor* a, const PlannedTensor* b) {
    return element_bytes(a->dtype) > element_bytes(b->dtype);
  });
  Json header = {{"__metadata__", {{"format", "pt"}}}};
  std::uint64_t at = 0;
  for (const PlannedTensor* tensor : tensors) {
    const std::uint64_t size = bytes_of(*tensor);
    header[tensor->name] = {
        {"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {at, at + size}}};
    places_[tensor->name] = {shards_.size(), at, size, false};
    at += size;
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(text.size() >> (8 * i) & 255);
  bytes += text;
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (file < 0) fail(path);
  shards_.push_back({path, file});
  write_at(shards_.back(), 0, std::as_bytes(std::span(bytes)));
  for (const PlannedTensor* tensor : tensors) places_.at(tensor->name).begin += bytes.size();
}

void CheckpointWriter::write_at(const Shard& shard, std::uint64_t begin, std::span<const std::byte> data) {
  while (!data.empty()) {
    const ssize_t n = ::pwrite(shard.file, data.data(), data.size(), static_cast<off_t>(begin));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(shard.path);
    begin += static_cast<std::uint64_t>(n);
    data = data.subspan(static_cast<std::size_t>(n));
  }
}

void CheckpointWriter::write(std::string_view name, std::span<const std::byte> data) {
  const auto found = places_.find(name);
  if (found == places_.end() || found->second.bytes != data.size() || found->second.written) {
    throw std::logic_error(
        fmt::format("tensor \"{}\" of {} bytes is not what was planned", name, data.size()));
  }
  write_at(shards_[found->second.shard], found->second.begin, data);
  found->second.written = true;
}

void CheckpointWriter::finish() {
  for (const auto& [name, place] : places_) {
    if (!place.written) throw std::logic_error(fmt::format("tensor \"{}\" was not written", name));
  }
}

}  // namespace flash_mla::checkpoint
