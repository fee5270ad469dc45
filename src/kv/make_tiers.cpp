#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <optional>
#include <utility>

#include "flash_mla/error.h"
#include "kv/kv_tier.h"

namespace flash_mla::kv {
namespace {

struct Spec {
  std::string directory;  // empty: host memory
  std::size_t bytes = 0;
};

/// As --memory takes it: KB and KiB are the same.
std::optional<std::size_t> bytes_of(std::string_view text) {
  std::size_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end == text.data()) return std::nullopt;
  std::string unit(end, text.data() + text.size());
  std::ranges::transform(unit, unit.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const auto& [name, shift] :
       {std::pair("", 0), std::pair("b", 0), std::pair("kb", 10), std::pair("kib", 10), std::pair("mb", 20),
        std::pair("mib", 20), std::pair("gb", 30), std::pair("gib", 30), std::pair("tb", 40),
        std::pair("tib", 40)}) {
    if (unit == name && value <= (~std::size_t{0} >> shift)) return value << shift;
  }
  return std::nullopt;
}

Spec parse(const std::string& text) {
  const auto refuse = [&](const char* what) {
    throw InvalidArgument(fmt::format(
        "kv_tiers: \"{}\" {}, expected ram:SIZE or file:DIRECTORY,SIZE, as in file:/var/cache/kv,64GiB", text,
        what));
  };
  Spec out;
  std::string_view size;
  if (text.starts_with("ram:")) {
    size = std::string_view(text).substr(4);
  } else if (text.starts_with("file:")) {
    const std::size_t comma = text.rfind(',');
    if (comma == std::string::npos || comma <= 5) refuse("names no directory or no size");
    out.directory = text.substr(5, comma - 5);
    size = std::string_view(text).substr(comma + 1);
  } else {
    refuse("is no tier");
  }
  const std::optional<std::size_t> bytes = bytes_of(size);
  if (!bytes) refuse("has no size");
  out.bytes = *bytes;
  return out;
}

}  // namespace

void check_tiers(std::span<const std::string> specs) {
  for (const std::string& spec : specs) parse(spec);
}

std::vector<std::unique_ptr<KvTier>> make_tiers(std::span<const std::string> specs,
                                                const TierConfig& config) {
  std::vector<std::unique_ptr<KvTier>> out;
  for (const std::string& text : specs) {
    const Spec spec = parse(text);
    if (spec.bytes < config.chunk_bytes) {
      throw InvalidArgument(
          fmt::format("kv_tiers: \"{}\" has {} bytes, expected at least the {} of a chunk of {} tokens", text,
                      spec.bytes, config.chunk_bytes, kChunkTokens));
    }
    out.push_back(spec.directory.empty() ? make_ram_tier(spec.bytes, config)
                                         : make_file_tier(spec.directory, spec.bytes, config));
  }
  return out;
}

}  // namespace flash_mla::kv
