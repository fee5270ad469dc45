// Arbitrary bytes as a safetensors file. What is accepted must lie within the file, cover it without overlap,
// and be readable as far as shape and dtype say, which AddressSanitizer watches; what is refused must leave a
// message.

#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>
#include <vector>

#include "checkpoint/convert.h"
#include "checkpoint/safetensors.h"
#include "flash_mla/error.h"

namespace {

using namespace flash_mla::checkpoint;

void require(bool condition) {
  if (!condition) std::abort();
}

void check(std::span<const std::byte> file, const std::vector<SafetensorsEntry>& entries) {
  std::size_t total = 0;
  for (const SafetensorsEntry& e : entries) {
    require(e.data.empty() ||
            (e.data.data() >= file.data() && e.data.data() + e.data.size() <= file.data() + file.size()));
    total += e.data.size();
    const auto convert = [&](std::string_view dtype, WeightType type, std::size_t bytes) {
      if (e.dtype != dtype) return;
      const WeightView view{type, e.shape, e.data.data()};
      require(static_cast<std::size_t>(view.elements()) * bytes == e.data.size());
      std::vector<float> out(static_cast<std::size_t>(view.elements()));
      to_float32(view, out.data());
    };
    convert("F32", WeightType::kFloat32, 4);
    convert("F16", WeightType::kFloat16, 2);
    convert("BF16", WeightType::kBFloat16, 2);
    convert("F8_E4M3", WeightType::kFloat8E4M3, 1);
  }
  require(total <= file.size() - 8);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(data), size);
  try {
    check(file, parse_safetensors(file, "fuzz"));
  } catch (const flash_mla::InvalidArgument& e) {
    require(std::string_view(e.what()).starts_with("fuzz: "));
  }
  return 0;
}
