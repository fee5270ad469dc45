#include "kv/chunk_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace flash_mla::kv {
namespace {

struct Header {
  std::array<char, 8> magic = {'F', 'M', 'L', 'A', 'K', 'V', '0', '1'};
  std::uint64_t salt_bytes = 0, num_tokens = 0, chunk_bytes = 0;
  std::uint64_t checksum_high = 0, checksum_low = 0;  // of the fields above and all that follows
};
constexpr std::size_t kCheckedHeader = offsetof(Header, checksum_high);

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() { close(); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  bool is_open() const { return descriptor_ >= 0; }
  bool close() {
    const int descriptor = std::exchange(descriptor_, -1);
    return descriptor < 0 || ::close(descriptor) == 0;
  }

  bool write(const void* data, std::size_t bytes) const {
    const auto* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(descriptor_, at, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return false;
      at += written;
      bytes -= static_cast<std::size_t>(written);
    }
    return true;
  }
  /// Bytes read, fewer at the end of the file; -1: it failed.
  ssize_t read(void* data, std::size_t bytes) const {
    auto* at = static_cast<char*>(data);
    std::size_t left = bytes;
    while (left > 0) {
      const ssize_t count = ::read(descriptor_, at, left);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) return -1;
      if (count == 0) break;
      at += count;
      left -= static_cast<std::size_t>(count);
    }
    return static_cast<ssize_t>(bytes - left);
  }
  std::int64_t size() const {
    struct stat status {};
    return fstat(descriptor_, &status) == 0 ? static_cast<std::int64_t>(status.st_size) : -1;
  }

 private:
  int descriptor_;
};

XXH128_hash_t checksum(const Header& header, std::string_view salt, std::span<const std::int32_t> tokens,
                       const Buffer& bytes) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  XXH3_128bits_update(&state, &header, kCheckedHeader);
  XXH3_128bits_update(&state, salt.data(), salt.size());
  XXH3_128bits_update(&state, tokens.data(), tokens.size_bytes());
  XXH3_128bits_update(&state, bytes.data(), bytes.bytes());
  return XXH3_128bits_digest(&state);
}

Header header_of(std::string_view salt, std::span<const std::int32_t> tokens, const Buffer& bytes) {
  Header header;
  header.salt_bytes = salt.size();
  header.num_tokens = tokens.size();
  header.chunk_bytes = bytes.bytes();
  return header;
}

bool write_all(const std::filesystem::path& path, std::string_view salt, std::span<const std::int32_t> tokens,
               const Buffer& bytes) {
  File file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!file.is_open()) return false;
  Header header = header_of(salt, tokens, bytes);
  const XXH128_hash_t sum = checksum(header, salt, tokens, bytes);
  header.checksum_high = sum.high64;
  header.checksum_low = sum.low64;
  return file.write(&header, sizeof(header)) && file.write(salt.data(), salt.size()) &&
         file.write(tokens.data(), tokens.size_bytes()) && file.write(bytes.data(), bytes.bytes()) &&
         file.close();
}

}  // namespace

std::size_t chunk_file_bytes(std::string_view salt, std::span<const std::int32_t> tokens, std::size_t bytes) {
  return sizeof(Header) + salt.size() + tokens.size_bytes() + bytes;
}

// Nothing is flushed to the disk: what a crash of the machine leaves of a file has another checksum.
bool write_chunk_file(const std::filesystem::path& path, const std::filesystem::path& temporary,
                      std::string_view salt, std::span<const std::int32_t> tokens, const Buffer& bytes) {
  const bool written = write_all(temporary, salt, tokens, bytes);
  if (written && std::rename(temporary.c_str(), path.c_str()) == 0) return true;
  ::unlink(temporary.c_str());
  return false;
}

ChunkFile read_chunk_file(const std::filesystem::path& path, std::string_view salt,
                          std::span<const std::int32_t> tokens, const Buffer& to) {
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.is_open()) return ChunkFile::kMissing;
  const Header expected = header_of(salt, tokens, to);
  if (file.size() != static_cast<std::int64_t>(chunk_file_bytes(salt, tokens, to.bytes())))
    return ChunkFile::kWrong;
  Header header;
  std::string its_salt(salt.size(), '\0');
  std::vector<std::int32_t> its_tokens(tokens.size());
  for (const auto& [data, bytes] : {std::pair<void*, std::size_t>(&header, sizeof(header)),
                                    {its_salt.data(), its_salt.size()},
                                    {its_tokens.data(), tokens.size_bytes()},
                                    {to.data(), to.bytes()}}) {
    const ssize_t count = file.read(data, bytes);
    if (count < 0) return ChunkFile::kMissing;
    if (count != static_cast<ssize_t>(bytes)) return ChunkFile::kWrong;
  }
  const XXH128_hash_t sum = checksum(header, its_salt, its_tokens, to);
  const bool good = std::memcmp(&header, &expected, kCheckedHeader) == 0 && its_salt == salt &&
                    std::memcmp(its_tokens.data(), tokens.data(), tokens.size_bytes()) == 0 &&
                    header.checksum_high == sum.high64 && header.checksum_low == sum.low64;
  return good ? ChunkFile::kGood : ChunkFile::kWrong;
}

}  // namespace flash_mla::kv
