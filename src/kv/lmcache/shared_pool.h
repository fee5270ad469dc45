#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace flash_mla::kv {

/// The pool of POSIX shared memory in which a server on this machine keeps its chunks. It stays mapped as long as somebody
/// reads it, also when the server has gone.
class SharedPool {
 public:
  /// Throws std::runtime_error if there is none of that name and size.
  SharedPool(const std::string& name, std::int64_t bytes);
  ~SharedPool();
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;

  /// Throws std::runtime_error for what lies outside.
  std::span<std::byte> slot(std::size_t offset, std::size_t length) const;

 private:
  std::size_t bytes_;
  std::byte* data_ = nullptr;
};

}  // namespace flash_mla::kv
