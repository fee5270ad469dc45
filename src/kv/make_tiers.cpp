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
  enum class Kind { kRam, kFile, kLmCache } kind = Kind::kRam;
  std::string place;      // a directory, or HOST:PORT
  std::size_t bytes = 0;  // none of a server
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

constexpr std::string_view kLmCache = "lmcache://";

/// HOST:PORT
bool is_address(std::string_view text) {
  const std::size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) return false;
  const std::string_view digits = text.substr(colon + 1);
  int port = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  return error == std::errc() && end == digits.data() + digits.size() && port >= 1 && port <= 65535 &&
         text.find('/') == std::string_view::npos;
}

Spec parse(const std::string& text) {
  const auto refuse = [&](const char* what) {
    throw InvalidArgument(fmt::format(
        "kv_tiers: \"{}\" {}, expected ram:SIZE, file:DIRECTORY,SIZE or lmcache://HOST:PORT, as in "
        "file:/var/cache/kv,64GiB",
        text, what));
  };
  Spec out;
  std::string_view size;
  if (text.starts_with("ram:")) {
    size = std::string_view(text).substr(4);
  } else if (text.starts_with("file:")) {
    const std::size_t comma = text.rfind(',');
    if (comma == std::string::npos || comma <= 5) refuse("names no directory or no size");
    out.kind = Spec::Kind::kFile;
    out.place = text.substr(5, comma - 5);
    size = std::string_view(text).substr(comma + 1);
  } else if (text.starts_with(kLmCache)) {
    out.kind = Spec::Kind::kLmCache;
    out.place = text.substr(kLmCache.size());
    if (!is_address(out.place)) refuse("names no host and port");
    return out;
  } else {
    refuse("is no tier");
  }
  const std::optional<std::size_t> bytes = bytes_of(size);
  if (!bytes) refuse("has no size");
  out.bytes = *bytes;
  return out;
}

}  // namespace

void check_tiers(std::span<const std::string> specs, bool shared) {
  bool server = false;
  for (const std::string& text : specs) {
    if (parse(text).kind != Spec::Kind::kLmCache) continue;
    server = true;
    if (const std::string why = why_no_lmcache(); !why.empty())
      throw Unsupported(fmt::format("kv_tiers: \"{}\": {}", text, why));
  }
  if (shared && !server) {
    throw InvalidArgument("kv_shared is set and kv_tiers has no lmcache://HOST:PORT, expected one");
  }
}

std::vector<std::unique_ptr<KvTier>> make_tiers(std::span<const std::string> specs,
                                                const TierConfig& config) {
  std::vector<std::unique_ptr<KvTier>> out;
  for (const std::string& text : specs) {
    const Spec spec = parse(text);
    if (spec.kind == Spec::Kind::kLmCache) {
      out.push_back(make_lmcache_tier(spec.place, config));
      continue;
    }
    if (spec.bytes < config.chunk_bytes) {
      throw InvalidArgument(
          fmt::format("kv_tiers: \"{}\" has {} bytes, expected at least the {} of a chunk of {} tokens", text,
                      spec.bytes, config.chunk_bytes, kChunkTokens));
    }
    out.push_back(spec.kind == Spec::Kind::kRam ? make_ram_tier(spec.bytes, config)
                                                : make_file_tier(spec.place, spec.bytes, config));
  }
  return out;
}

}  // namespace flash_mla::kv
