#include "kv/lmcache/shared_pool.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stdexcept>

namespace flash_mla::kv {

SharedPool::SharedPool(const std::string& name, std::int64_t bytes)
    : bytes_(static_cast<std::size_t>(bytes)) {
  if (name.empty() || bytes <= 0) {
    throw std::runtime_error(
        "LMCache: the server has no pool of shared memory (--supported-transfer-mode engine_driven, --shm-name)");
  }
  const int file = shm_open((name.front() == '/' ? name : "/" + name).c_str(), O_RDWR | O_CLOEXEC, 0);
  if (file < 0) {
    throw std::runtime_error(fmt::format(
        "LMCache: shared memory {} cannot be opened: is the server on this machine, and of this user?",
        name));
  }
  struct stat status {};
  const bool whole = fstat(file, &status) == 0 && status.st_size >= bytes;
  void* const data = whole ? mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : MAP_FAILED;
  ::close(file);
  if (data == MAP_FAILED) {
    throw std::runtime_error(
        fmt::format("LMCache: shared memory {} of {} bytes cannot be mapped", name, bytes));
  }
  data_ = static_cast<std::byte*>(data);
}

SharedPool::~SharedPool() { munmap(data_, bytes_); }

std::span<std::byte> SharedPool::slot(std::size_t offset, std::size_t length) const {
  if (offset > bytes_ || length > bytes_ - offset) {
    throw std::runtime_error(
        fmt::format("LMCache: a slot of {} bytes at {} lies outside the pool of {}", length, offset, bytes_));
  }
  return {data_ + offset, length};
}

}  // namespace flash_mla::kv
