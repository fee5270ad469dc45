#include "checkpoint/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "base/json.h"
#include "flash_mla/error.h"

namespace flash_mla::checkpoint {
namespace {

// The reference implementation's limit. DeepSeek-V3's largest shard has 0.2 MB.
constexpr std::uint64_t kMaxHeader = 100'000'000;
constexpr std::size_t kMaxRank = 16;

struct DType {
  std::string_view name;
  int bits;
};
// Also those that no weight may have: a checkpoint may carry other tensors.
constexpr DType kDTypes[] = {{"F32", 32},    {"F16", 16},    {"BF16", 16},   {"F8_E4M3", 8}, {"F8_E5M2", 8},
                             {"F8_E8M0", 8}, {"F64", 64},    {"I64", 64},    {"U64", 64},    {"I32", 32},
                             {"U32", 32},    {"I16", 16},    {"U16", 16},    {"I8", 8},      {"U8", 8},
                             {"BOOL", 8},    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},      {"C64", 64}};

/// What one entry says, with its bytes as offsets behind the header.
struct Extent {
  SafetensorsEntry entry;
  std::uint64_t begin, end;
};

class HeaderReader {
 public:
  HeaderReader(std::string_view origin, std::uint64_t data_bytes)
      : origin_(origin), data_bytes_(data_bytes) {}

  Extent read(const std::string& name, const Json& json) const {
    const JsonObject in(json, std::string(origin_), fmt::format("tensor \"{}\": ", name));
    Extent out;
    out.entry.name = name;
    out.entry.dtype = in.string("dtype");
    const auto* dtype = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                     [&](const DType& d) { return d.name == out.entry.dtype; });
    if (dtype == std::end(kDTypes)) in.fail("dtype", "a dtype of safetensors, such as \"BF16\"");
    const std::uint64_t bytes = read_shape(in, dtype->bits, out.entry.shape);

    const Json& offsets = in.array("data_offsets");
    if (offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
      in.fail("data_offsets", "[begin, end], two non-negative integers");
    }
    out.begin = offsets[0].get<std::uint64_t>();
    out.end = offsets[1].get<std::uint64_t>();
    if (out.begin > out.end) in.fail("data_offsets", "begin <= end");
    if (out.end > data_bytes_) {
      in.fail("data_offsets", fmt::format("an end of at most {}, the bytes behind the header", data_bytes_));
    }
    if (out.end - out.begin != bytes) {
      in.fail("data_offsets", fmt::format("{} bytes, the size of shape {} in {}", bytes,
                                          shown(json.at("shape")), out.entry.dtype));
    }
    return out;
  }

  /// Every byte belongs to one tensor: neither overlaps nor gaps.
  void check_cover(std::vector<Extent>& extents) const {
    std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
      return std::tie(a.begin, a.end, a.entry.name) < std::tie(b.begin, b.end, b.entry.name);
    });
    std::uint64_t at = 0;
    std::string before = "the header";
    for (const Extent& e : extents) {
      if (e.begin != at) {
        throw InvalidArgument(
            fmt::format("{}: tensor \"{}\" begins at byte {}, {} {}, which ends at byte {}: expected no {}",
                        origin_, e.entry.name, e.begin, e.begin < at ? "inside" : "apart from", before, at,
                        e.begin < at ? "overlap" : "gap"));
      }
      at = e.end;
      before = fmt::format("tensor \"{}\"", e.entry.name);
    }
    if (at != data_bytes_) {
      throw InvalidArgument(
          fmt::format("{}: {} bytes follow the header, {} belong to tensors: expected no rest", origin_,
                      data_bytes_, at));
    }
  }

 private:
  static std::uint64_t read_shape(const JsonObject& in, int bits, std::vector<std::int64_t>& shape) {
    const Json& json = in.array("shape");
    if (json.size() > kMaxRank) in.fail("shape", fmt::format("at most {} dimensions", kMaxRank));
    std::uint64_t elements = 1;
    for (const Json& size : json) {
      if (!size.is_number_unsigned()) in.fail("shape", "non-negative integers");
      const auto n = size.get<std::uint64_t>();
      // Bounds every product by 2^59, so that bits fit.
      constexpr std::uint64_t kMax = std::uint64_t{1} << 59;
      if (n > kMax || (n != 0 && elements > kMax / n)) in.fail("shape", "at most 2^59 elements");
      elements *= n;
      shape.push_back(static_cast<std::int64_t>(n));
    }
    if (elements > std::numeric_limits<std::uint64_t>::max() / static_cast<unsigned>(bits)) {
      in.fail("shape", "less than 2^61 bytes");
    }
    const std::uint64_t total = elements * static_cast<unsigned>(bits);
    if (total % 8 != 0) in.fail("shape", "a whole number of bytes");
    return total / 8;
  }

  std::string_view origin_;
  std::uint64_t data_bytes_;
};

}  // namespace

std::vector<SafetensorsEntry> parse_safetensors(std::span<const std::byte> file, std::string_view origin) {
  refuse_lfs_pointer({reinterpret_cast<const char*>(file.data()), std::min<std::size_t>(file.size(), 1024)},
                     origin);
  if (file.size() < 8) {
    throw InvalidArgument(fmt::format("{}: the file has {} bytes, expected a safetensors file of at least 8",
                                      origin, file.size()));
  }
  std::uint64_t header_bytes = 0;
  for (int i = 0; i < 8; ++i) {
    header_bytes |= std::to_integer<std::uint64_t>(file[static_cast<std::size_t>(i)]) << (8 * i);
  }
  if (header_bytes > kMaxHeader || header_bytes > file.size() - 8) {
    throw InvalidArgument(fmt::format("{}: header length = {}: expected at most {} (the file has {} bytes)",
                                      origin, header_bytes,
                                      std::min<std::uint64_t>(kMaxHeader, file.size() - 8), file.size()));
  }
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + 8, header_bytes);
  const std::span<const std::byte> data = file.subspan(8 + header_bytes);
  const Json json = parse_json(header, fmt::format("{}: header", origin));
  if (!json.is_object()) {
    throw InvalidArgument(fmt::format("{}: header = {}: expected a JSON object", origin, shown(json)));
  }

  const HeaderReader reader(origin, data.size());
  std::vector<Extent> extents;
  for (const auto& [name, value] : json.items()) {
    if (name != "__metadata__") extents.push_back(reader.read(name, value));
  }
  reader.check_cover(extents);

  std::vector<SafetensorsEntry> out;
  out.reserve(extents.size());
  for (Extent& e : extents) {
    e.entry.data = data.subspan(e.begin, e.end - e.begin);
    out.push_back(std::move(e.entry));
  }
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  return out;
}

}  // namespace flash_mla::checkpoint
