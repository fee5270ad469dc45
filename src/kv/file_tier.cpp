#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>

#include "flash_mla/error.h"
#include "kv/chunk_file.h"
#include "kv/kv_tier.h"

namespace flash_mla::kv {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSuffix = ".kv";
constexpr const char* kTemporary = ".tmp-";
// How old a file under its first name is that nobody can be writing any more.
constexpr auto kAbandoned = std::chrono::hours(1);

/// Names end with the chunk's place in its prompt.
fs::path file_name(const ChunkKey& key, std::size_t chunk) {
  return fmt::format("{:016x}{:016x}-{}{}", key.high, key.low, chunk, kSuffix);
}

/// The place that a name ends with, or -1 if it is no chunk's.
std::int64_t place_of(const std::string& name) {
  constexpr std::size_t kDigits = 32;
  const std::size_t end = name.size() - std::min(name.size(), std::string_view(kSuffix).size());
  if (end <= kDigits + 1 || end > kDigits + 10 || name[kDigits] != '-' || name.substr(end) != kSuffix)
    return -1;
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  const auto is_hex = [&](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); };
  if (!std::all_of(name.begin(), name.begin() + kDigits, is_hex)) return -1;
  if (!std::all_of(name.begin() + kDigits + 1, name.begin() + static_cast<std::ptrdiff_t>(end), is_digit))
    return -1;
  return std::stoll(name.substr(kDigits + 1, end - kDigits - 1));
}

void touch(const fs::path& path) { utimensat(AT_FDCWD, path.c_str(), nullptr, 0); }

class FileTier : public KvTier {
 public:
  FileTier(fs::path directory, std::size_t bytes, TierConfig config)
      : directory_(std::move(directory)), limit_(bytes), config_(std::move(config)) {
    std::error_code error;
    fs::create_directories(directory_, error);
    if (error || ::access(directory_.c_str(), R_OK | W_OK | X_OK) != 0) {
      throw InvalidArgument(fmt::format("kv_tiers: the directory {} cannot be {}: {}", directory_.string(),
                                        error ? "made" : "written to",
                                        error ? error.message() : std::generic_category().message(errno)));
    }
    make_room(0);
  }

  const char* name() const override { return "file"; }
  std::unique_ptr<TierMatch> look_up(std::span<const std::int32_t> tokens) override;
  bool store(std::span<const std::int32_t> tokens, const Buffer& bytes) override;
  Buffer read(const ChunkKey& key, std::span<const std::int32_t> tokens) const;

 private:
  fs::path path_of(const ChunkKey& key, std::size_t chunk) const {
    return directory_ / file_name(key, chunk);
  }
  /// A prompt's chunks have been used: the last first, so that it is not the first ones which go first.
  void touch_all(std::span<const ChunkKey> keys) const {
    for (std::size_t i = keys.size(); i-- > 0;) touch(path_of(keys[i], i));
  }
  void make_room(std::size_t bytes);

  const fs::path directory_;
  const std::size_t limit_;
  const TierConfig config_;
  std::atomic<std::int64_t> num_written_ = 0;
  std::mutex mutex_;           // of what follows
  std::size_t used_ = 0;       // as far as is known: others may write, too
  std::size_t unscanned_ = 0;  // written since the directory was last looked through
};

class FileMatch : public TierMatch {
 public:
  FileMatch(const FileTier& tier, std::vector<ChunkKey> keys, std::span<const std::int32_t> tokens)
      : tier_(tier), keys_(std::move(keys)), tokens_(tokens.begin(), tokens.end()) {}
  std::int64_t num_chunks() const override { return std::ssize(keys_); }
  Buffer read(std::int64_t chunk) override {
    return tier_.read(keys_[static_cast<std::size_t>(chunk)],
                      std::span(tokens_).first(static_cast<std::size_t>((chunk + 1) * kChunkTokens)));
  }

 private:
  const FileTier& tier_;
  std::vector<ChunkKey> keys_;
  std::vector<std::int32_t> tokens_;
};

std::unique_ptr<TierMatch> FileTier::look_up(std::span<const std::int32_t> tokens) {
  std::vector<ChunkKey> keys = chunk_keys(config_.salt, tokens);
  std::size_t found = 0;
  while (found < keys.size() && ::access(path_of(keys[found], found).c_str(), R_OK) == 0) ++found;
  keys.resize(found);
  touch_all(keys);
  return keys.empty() ? nullptr : std::make_unique<FileMatch>(*this, std::move(keys), tokens);
}

Buffer FileTier::read(const ChunkKey& key, std::span<const std::int32_t> tokens) const {
  const fs::path path = path_of(key, tokens.size() / kChunkTokens - 1);
  Buffer bytes = config_.allocate();
  switch (read_chunk_file(path, config_.salt, tokens, bytes)) {
    case ChunkFile::kGood:
      return bytes;
    case ChunkFile::kWrong:
      ::unlink(path.c_str());  // a good one may take its place
      break;
    case ChunkFile::kMissing:
      break;
  }
  return {};
}

bool FileTier::store(std::span<const std::int32_t> tokens, const Buffer& bytes) {
  const std::vector<ChunkKey> keys = chunk_keys(config_.salt, tokens);
  const fs::path path = path_of(keys.back(), keys.size() - 1);
  touch_all(keys);
  if (::access(path.c_str(), F_OK) == 0) return true;
  const std::size_t size = chunk_file_bytes(config_.salt, tokens, bytes.bytes());
  if (size > limit_) return false;
  make_room(size);
  const fs::path temporary = directory_ / fmt::format("{}{}-{}", kTemporary, getpid(), ++num_written_);
  if (!write_chunk_file(path, temporary, config_.salt, tokens, bytes)) return false;
  const std::lock_guard lock(mutex_);
  used_ += size;
  unscanned_ += size;
  return true;
}

// Removes the files used longest ago until there is room for `bytes` more. The directory is looked through when that may
// be so, and now and then for the sake of what others write.
void FileTier::make_room(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (bytes > 0 && used_ + bytes <= limit_ && unscanned_ <= limit_ / 16) return;
  struct Entry {
    fs::file_time_type used;
    std::int64_t place;
    std::size_t size;
    fs::path path;
  };
  std::vector<Entry> entries;
  used_ = unscanned_ = 0;
  std::error_code error;
  for (const fs::directory_entry& file : fs::directory_iterator(directory_, error)) {
    const std::string name = file.path().filename().string();
    const std::int64_t place = place_of(name);
    const bool temporary = name.starts_with(kTemporary);
    if (place < 0 && !temporary) continue;  // not ours
    const std::size_t size = file.file_size(error);
    if (error) continue;  // somebody has removed it
    const fs::file_time_type used = file.last_write_time(error);
    if (error) continue;
    if (temporary && fs::file_time_type::clock::now() - used > kAbandoned) {
      fs::remove(file.path(), error);
      continue;
    }
    used_ += size;
    if (!temporary) entries.push_back({used, place, size, file.path()});
  }
  // Of those used in the same moment the later ones of a prompt first.
  std::ranges::sort(entries, [](const Entry& a, const Entry& b) {
    return std::pair(a.used, -a.place) < std::pair(b.used, -b.place);
  });
  // A tenth more than is needed, so that not every chunk looks for another to take the place of.
  const std::size_t wanted = used_ + bytes <= limit_ ? limit_ : std::max(limit_ - limit_ / 10, bytes);
  for (const Entry& entry : entries) {
    if (used_ + bytes <= wanted) break;
    if (fs::remove(entry.path, error)) used_ -= entry.size;
  }
}

}  // namespace

std::unique_ptr<KvTier> make_file_tier(const std::string& directory, std::size_t bytes,
                                       const TierConfig& config) {
  return std::make_unique<FileTier>(directory, bytes, config);
}

}  // namespace flash_mla::kv
