#include "model/int4_weight.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "base/element.h"
#include "base/parallel.h"
#include "kernels/quant/cpu/weights.h"

namespace flash_mla::model {
namespace {

constexpr std::int64_t kWordColumns = 8;

/// Eight codes, the even ones in the lower half of the word (int4_place()).
std::uint32_t pack_word(const std::uint8_t* codes) {
  static_assert(std::endian::native == std::endian::little);
  std::uint64_t x = 0;
  std::memcpy(&x, codes, sizeof(x));
  const auto gather = [](std::uint64_t every_second) {
    const std::uint64_t e = every_second & 0x000F000F000F000Fu;
    return static_cast<std::uint32_t>((e | e >> 12 | e >> 24 | e >> 36) & 0xFFFFu);
  };
  return gather(x) | gather(x >> 8) << 16;
}

}  // namespace

Int4Weight::Int4Weight(std::int64_t num_rows, std::int64_t num_columns)
    : rows(num_rows),
      columns(num_columns),
      codes(std::make_unique_for_overwrite<std::uint8_t[]>(static_cast<std::size_t>(rows * columns))),
      scales(static_cast<std::size_t>(rows * groups())) {}

bool stored_as_int4(const Weight& weight) {
  if (!weight.stored || weight.stored->type != QuantizedType::kInt4) return false;
  const std::int64_t group = weight.stored->group;
  return takes_int4(weight.rows, weight.columns) && (group % kInt4Group == 0 || group >= weight.columns);
}

bool asks_for_int4(ModelQuantize quantize, LayerKind kind) {
  const std::optional<QuantizedFormat> format = quantized_format(quantize, kind);
  return format && format->type == QuantizedType::kInt4;
}

Int4Weight read_int4(const Weight& weight) {
  Int4Weight out(weight.rows, weight.columns);
  if (stored_as_int4(weight)) {
    const std::int64_t stored = weight.stored->groups(weight.columns), groups = out.groups();
    std::vector<float> scales(static_cast<std::size_t>(weight.rows * stored));
    weight.read_quantized(out.codes.get(), scales.data());
    for (std::int64_t row = 0; row < weight.rows; ++row) {
      for (std::int64_t g = 0; g < groups; ++g) {
        out.scales[static_cast<std::size_t>(row * groups + g)] =
            scales[static_cast<std::size_t>(row * stored + g * kInt4Group / weight.stored->group)];
      }
    }
    return out;
  }
  const auto size = static_cast<std::size_t>(weight.size());
  const auto values = std::make_unique_for_overwrite<std::uint16_t[]>(size);
  weight.read(values.get());
  std::vector<float> wide(size);
  std::transform(values.get(), values.get() + size, wide.begin(),
                 [](std::uint16_t x) { return to_float(Bf16{x}); });
  cpu::quantise_int4(wide.data(), weight.rows, weight.columns, kInt4Group, out.codes.get(),
                     out.scales.data());
  return out;
}

void pack_int4(const Int4Weight& weight, const Int4Cut& cut, std::uint8_t* codes, float* scales,
               std::int64_t scale_stride) {
  const std::int64_t words = cut.columns / kWordColumns, pairs = cut.rows / 2, groups = weight.groups();
  constexpr std::int64_t kPairsOfTask = 32;
  parallel_for((pairs + kPairsOfTask - 1) / kPairsOfTask, default_threads(), [&](std::int64_t task) {
    const std::int64_t end = std::min(pairs, (task + 1) * kPairsOfTask);
    for (std::int64_t pair = task * kPairsOfTask; pair < end; ++pair) {
      const std::uint8_t* const upper =
          weight.codes.get() + (cut.row + 2 * pair) * weight.columns + cut.column;
      const std::uint8_t* const lower = upper + weight.columns;
      std::uint8_t* const to = codes + pair * cut.columns;
      for (std::int64_t w = 0; w < words; ++w) {
        const std::uint32_t both[2] = {pack_word(upper + w * kWordColumns),
                                       pack_word(lower + w * kWordColumns)};
        std::memcpy(to + w * kWordColumns, both, sizeof(both));
      }
    }
  });
  const std::int64_t first = cut.column / kInt4Group, of_cut = (cut.columns + kInt4Group - 1) / kInt4Group;
  for (std::int64_t row = 0; row < cut.rows; ++row) {
    for (std::int64_t g = 0; g < of_cut; ++g) {
      scales[g * scale_stride + row] =
          weight.scales[static_cast<std::size_t>((cut.row + row) * groups + first + g)];
    }
  }
}

}  // namespace flash_mla::model
