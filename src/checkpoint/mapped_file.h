#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace flash_mla::checkpoint {

/// A file's bytes, mapped read-only. The file must not be shortened while it is mapped.
class MappedFile {
 public:
  /// Throws InvalidArgument if it is no regular file or cannot be mapped.
  explicit MappedFile(std::filesystem::path path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  std::filesystem::path path_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace flash_mla::checkpoint
