#include "checkpoint/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "flash_mla/error.h"

namespace flash_mla::checkpoint {

MappedFile::MappedFile(std::filesystem::path path) : path_(std::move(path)) {
  const auto fail = [&](const char* what) {
    throw InvalidArgument(fmt::format("{}: {}; expected a file that can be read", path_.string(), what));
  };
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail(std::strerror(errno));
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    fail("is not a regular file");
  }
  size_ = static_cast<std::size_t>(info.st_size);
  // An empty range cannot be mapped; its reader says what is missing.
  void* const data = size_ == 0 ? nullptr : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  ::close(fd);
  if (data == MAP_FAILED) fail(std::strerror(error));
  data_ = data;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace flash_mla::checkpoint
